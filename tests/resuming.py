"""Run training scripts in forked children of a process that has imported everything and has never trained.

    python tests/resuming.py JOBS.json

JOBS.json: {"side_by_side": 2, "chains": [[{"script": "train_seq2seq", "processes": 2, "arguments": [...], "notes": FOLDER,
"stop_after": 11}, ...], ...]}. The runs of a chain follow one another, each in new processes; chains run side by side. A run
whose stop_after is a number gets SIGTERM, on its last rank alone, after the first micro-batch of that step. FOLDER gets
rankN.jsonl, the loss of every micro-batch as hex; rankN.txt, what the rank said; and exit_codes.json. Since imports are made
once, a run starts in a second.
"""

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
from training.engine.launch import _import_deepspeed
from training.loop import loop

IMPORTED_LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "datasets", "matplotlib.pyplot")  # seconds in each child
SCRIPTS = {"train_seq2seq": train_seq2seq, "train_tokenizer": train_tokenizer}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def note_losses(path: Path, stop_after: int | None) -> None:
    """Let the loop write every micro-batch's loss to `path`, and be told to stop while it makes step `stop_after` (1..)."""
    file, one_step = path.open("w", encoding="utf-8"), loop._one_step

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
            loss = one_step(task, config, batches, step, window)
        finally:
            task.train = train
        file.write(json.dumps({"step": step, "losses": losses}) + "\n")
        file.flush()
        return loss

    loop._one_step = noted


def rank_of(run: dict[str, Any], rank: int, port: int) -> None:
    """One process of a run; does not return."""
    world, notes = run["processes"], Path(run["notes"])
    said = os.open(notes / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    note_losses(notes / f"rank{rank}.jsonl", run["stop_after"] if rank == world - 1 else None)
    code = SCRIPTS[run["script"]].main(run["arguments"])
    sys.stderr.flush()
    os._exit(code)


def run_chain(runs: list[dict[str, Any]]) -> None:
    """The runs one after another; the rest is left out where one ended otherwise than asked."""
    for run in runs:
        notes, port = Path(run["notes"]), free_port()
        notes.mkdir(parents=True)
        ranks = []
        for rank in range(run["processes"]):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                try:
                    rank_of(run, rank, port)
                finally:
                    os._exit(70)
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        (notes / "exit_codes.json").write_text(json.dumps(codes))
        if set(codes) != {0 if run["stop_after"] is None else 128 + signal.SIGTERM}:
            return


def main() -> int:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    _import_deepspeed()
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
