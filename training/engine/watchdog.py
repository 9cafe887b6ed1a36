"""Detect a stalled run: report where each rank hangs, then exit.

A thread of every process writes what its main thread is doing into a file beside the others'. When
no step was finished for `seconds`, each process writes its stacks, and the first that still answers
reports where every rank is, or that it does not answer; after the same time again all end with exit
code 1. Where Python itself is stuck, faulthandler's own thread, which needs no interpreter, writes
the stacks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from tokenloom_common.files import write_text_atomic
from training.engine.processes import Processes

log = logging.getLogger(__name__)

LOOKS = 10  # in the time after which a run counts as stalled
LEAST_ANSWER_SECONDS = 2.0
OUR_PACKAGES = ("training", "inference", "seq2seq", "tokenizer_image")  # not libraries' frames
DEEPEST = 4  # parts of a file's name from its package on: inference/decoder/native/step.py


class Watchdog:
    """The watchdog of one process. `beat` after each step; `seconds` 0 turns it off."""

    def __init__(self, run_dir: Path, group: Processes, seconds: float) -> None:
        self.seconds = seconds
        self.rank = group.rank
        self.world_size = group.world_size
        self._folder = run_dir / "incidents"
        self._main_thread = threading.get_ident()
        self._ended = threading.Event()
        self._paused = False
        self._moved_at = time.monotonic()
        self._step = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, steps must follow one another within `seconds`."""
        if not self.seconds:
            yield
            return

        self._folder.mkdir(parents=True, exist_ok=True)
        self._moved_at = time.monotonic()  # set-up before this took its time
        stacks = self._folder / f"rank{self.rank}.stacks.txt"
        with stacks.open("w", encoding="utf-8") as file:
            thread = threading.Thread(target=self._watch, args=(file,), name="watchdog",
                                      daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()

        # not reached on an error, which leaves the last state and stacks for its reader
        self._state_file(self.rank).unlink(missing_ok=True)
        if not stacks.stat().st_size:
            stacks.unlink()

    def beat(self, step: int) -> None:
        """Note that a step is done."""
        self._moved_at = time.monotonic()
        self._step = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allow work that takes its time: sampling, saving."""
        self._paused = True
        try:
            yield
        finally:
            self._moved_at = time.monotonic()  # first: the thread may look between these two
            self._paused = False

    def _watch(self, file: TextIO) -> None:
        reported = False
        while not self._ended.wait(self.seconds / LOOKS):
            # started anew at each look, so it fires only when this thread does not run either
            faulthandler.dump_traceback_later(self.seconds, file=file)
            still = 0.0 if self._paused else time.monotonic() - self._moved_at
            self._write_state()

            if still <= self.seconds:
                reported = False
            elif not reported:
                reported = True
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                self._report(logging.WARNING,
                             f"no step was finished for {still:.0f} s (train.stall_seconds "
                             f"{self.seconds:g}): {self._ranks()}; stacks are in {self._folder}")
            elif still > 2 * self.seconds:
                self._report(logging.ERROR,
                             f"error: the run stands still: {self._ranks()}; it ends here; the "
                             "same command goes on from the last checkpoint")
                # the main thread waits inside a library for a process that will not answer, and
                # sys.exit would end this thread alone
                os._exit(1)

    def _write_state(self) -> None:
        where = _place(sys._current_frames().get(self._main_thread))
        state = {"step": self._step, "where": where}
        write_text_atomic(self._state_file(self.rank), json.dumps(state))

    def _ranks(self) -> str:
        """Where every rank is, in words."""
        places = []
        for rank in range(self.world_size):
            state = self._read_state(rank)
            place = "does not answer"
            if state:
                place = f"after step {state['step']} at {state['where']}"
            places.append(f"rank {rank} {place}")
        return ", ".join(places)

    def _read_state(self, rank: int) -> dict[str, Any] | None:
        """The state that a rank last wrote; None if that is long ago."""
        path = self._state_file(rank)
        try:
            age = time.time() - path.stat().st_mtime
            # five looks missed, or two seconds for short limits and slow disks
            if age > max(LEAST_ANSWER_SECONDS, self.seconds / 2):
                return None
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _report(self, level: int, message: str) -> None:
        """Log a message on the first rank that answers."""
        if any(self._read_state(rank) is not None for rank in range(self.rank)):
            return
        if level == logging.ERROR:  # the last words of this process
            print(f"training: {message}", file=sys.stderr, flush=True)
        else:
            log.warning("%s", message)

    def _state_file(self, rank: int) -> Path:
        return self._folder / f".rank{rank}.json"


def _place(frame: FrameType | None) -> str:
    """`file:line function` of the innermost call in our own packages, else of the innermost."""
    if frame is None:
        return "nowhere"
    innermost = frame
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for depth in range(2, DEEPEST + 1):
            if len(parts) >= depth and parts[-depth] in OUR_PACKAGES:
                name = "/".join(parts[-depth:])
                return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
