"""Train in forked children and kill them with SIGKILL at random moments, until enough died and one came to the end.

    python tests/killing.py KILLS SEED LOG training/train_seq2seq.py's arguments ...

Imports once: a child starts in a second. LOG gets a line for every finished step and one for every kill.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import train_seq2seq
from training.engine.launch import _import_deepspeed
from training.loop import loop

LONGEST_SECONDS = 2.0  # that a child lives; starting takes about one
SAVING_EVERY = 5


def child(log: Path, arguments: list[str]) -> None:
    one_step = loop._one_step

    def noted(task, config, batches, step, window):
        loss = one_step(task, config, batches, step, window)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"step {step}\n")
        return loss

    loop._one_step = noted
    os._exit(train_seq2seq.main(arguments))


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written, or was when its writer died."""
    return any((run_dir / "checkpoints").glob(".step-*.tmp"))


def main() -> int:
    kills, seed, log, arguments = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    run_dir = Path(arguments[arguments.index("--run_dir") + 1])
    _import_deepspeed()
    log.touch()
    chance, killed = random.Random(seed), 0
    while True:
        process = os.fork()
        if process == 0:
            child(log, arguments)
        # every fifth dies when it begins to save, the others at any moment
        in_saving = killed < kills and killed % SAVING_EVERY == SAVING_EVERY - 1
        ends = time.monotonic() + (300 if killed >= kills or in_saving else chance.uniform(0, LONGEST_SECONDS))
        size = log.stat().st_size
        while time.monotonic() < ends and not (in_saving and log.stat().st_size > size and saving(run_dir)):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) if killed >= kills else 99  # 99: too few steps to be killed in
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        killed += 1
        with log.open("a", encoding="utf-8") as file:
            file.write(f"killed{' while saving' if saving(run_dir) else ''}\n")


if __name__ == "__main__":
    sys.exit(main())
