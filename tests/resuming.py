"""Run training scripts in forked children of a process that has imported all and never trained.

    python tests/resuming.py JOBS.json

JOBS.json: {"side_by_side": 2, "chains": [[{"script": "train_seq2seq", "processes": 2, "arguments":
[...], "notes": FOLDER, "stop_after": 11}, ...], ...]}. The runs of a chain follow one another, each
in new processes; chains run side by side. A run whose stop_after is a number gets SIGTERM, on its
last rank alone, after the first micro-batch of that step. FOLDER gets rankN.jsonl, the loss of
every micro-batch as hex; rankN.txt, the rank's output; and exit_codes.json. Imports are made once,
so that a run starts in a second."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import train_seq2seq, train_tokenizer
from training.engine.launch import import_deepspeed
from training.loop import loop

# seconds in each child, unless they are imported before the fork
IMPORTED_LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "datasets", "matplotlib.pyplot")
SCRIPTS = {"train_seq2seq": train_seq2seq, "train_tokenizer": train_tokenizer}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def note_losses(path: Path, stop_after: int | None) -> None:
    """Write the loss of every micro-batch to `path`, and stop in step `stop_after` (1..)."""
    file, run_step = path.open("w", encoding="utf-8"), loop.run_step

    def noted(task, config, batches, step, window):
        losses, train = [], task.train

        def train_one(batch, step):
            terms = train(batch, step)
            losses.append(float(terms["loss"]).hex())
            if step + 1 == stop_after and len(losses) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return terms

        task.train = train_one
        try:
            loss = run_step(task, config, batches, step, window)
        finally:
            task.train = train
        file.write(json.dumps({"step": step, "losses": losses}) + "\n")
        file.flush()
        return loss

    loop.run_step = noted


def rank_of(run: dict[str, Any], rank: int, port: int) -> None:
    """Be one process of a run; does not return."""
    world, notes = run["processes"], Path(run["notes"])
    output = os.open(notes / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    is_last = rank == world - 1
    note_losses(notes / f"rank{rank}.jsonl", run["stop_after"] if is_last else None)
    code = SCRIPTS[run["script"]].main(run["arguments"])
    sys.stderr.flush()
    os._exit(code)


def run_chain(runs: list[dict[str, Any]]) -> None:
    """Make the runs one after another, up to one that ends otherwise than asked."""
    for run in runs:
        notes, port = Path(run["notes"]), free_port()
        notes.mkdir(parents=True)
        ranks = []
        for rank in range(run["processes"]):
            child = os.fork()
            if child == 0:
                try:
                    rank_of(run, rank, port)
                finally:
                    # rank_of raised: without this, the child would go on as the parent
                    os._exit(70)
            ranks.append(child)

        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        (notes / "exit_codes.json").write_text(json.dumps(codes))
        expected = 0 if run["stop_after"] is None else 128 + signal.SIGTERM
        if set(codes) != {expected}:
            return


def main() -> int:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    import_deepspeed()
    for module in IMPORTED_LATE:
        importlib.import_module(module)
    running: set[int] = set()
    for chain in jobs["chains"]:
        if len(running) >= jobs["side_by_side"]:
            running.remove(os.wait()[0])
        child = os.fork()
        if child == 0:
            run_chain(chain)
            os._exit(0)
        running.add(child)
    while running:
        running.remove(os.wait()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
