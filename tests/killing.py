"""Kill forked children that train with SIGKILL at random moments, until one comes to the end.

    python tests/killing.py KILLS SEED LOG training/train_seq2seq.py's arguments ...

KILLS children are killed first. Imports are made once: a child starts in a second. LOG gets a line
for every finished step and one for every kill.
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
from training.engine.launch import import_deepspeed
from training.loop import loop

LONGEST_SECONDS = 2.0  # that a child lives; starting takes about one
SAVING_EVERY = 5  # of so many kills, one is while a checkpoint is written
TOO_FEW_STEPS = 99  # exit code: the run came to its end before it was killed often enough


def child(log: Path, arguments: list[str]) -> None:
    """Train to the end, and log every finished step; does not return."""
    run_step = loop.run_step

    def noted(task, config, batches, step, window):
        loss = run_step(task, config, batches, step, window)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"step {step}\n")
        return loss

    loop.run_step = noted
    os._exit(train_seq2seq.main(arguments))


def saving(run_dir: Path) -> bool:
    """Whether a checkpoint is being written, or was when its writer died."""
    return any((run_dir / "checkpoints").glob(".step-*.tmp"))


def main() -> int:
    kills, seed, log, arguments = int(
        sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    run_dir = Path(arguments[arguments.index("--run_dir") + 1])
    import_deepspeed()
    log.touch()
    chance, killed = random.Random(seed), 0
    while True:
        process = os.fork()
        if process == 0:
            child(log, arguments)

        is_last = killed >= kills
        dies_saving = not is_last and killed % SAVING_EVERY == SAVING_EVERY - 1
        patience = 300 if is_last or dies_saving else chance.uniform(0, LONGEST_SECONDS)
        ends, size = time.monotonic() + patience, log.stat().st_size
        while time.monotonic() < ends:
            # after a step of its own: by then the leftovers of one that was killed are gone
            if dies_saving and log.stat().st_size > size and saving(run_dir):
                break
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) if is_last else TOO_FEW_STEPS
            time.sleep(0.001)

        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        killed += 1
        with log.open("a", encoding="utf-8") as file:
            file.write(f"killed{' while saving' if saving(run_dir) else ''}\n")


if __name__ == "__main__":
    sys.exit(main())
