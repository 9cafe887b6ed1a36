"""A run that no longer moves says which process stalls and where, and ends, instead of waiting for ever.

A thread of every process writes what its main thread is doing into a file beside the others'. When no step was finished for
`seconds`, each process writes its stacks and the first that still answers says of every rank where it is, or that it does not
answer; after the same time again all end with exit code 1. Where Python itself is stuck, faulthandler's own thread, which needs
none, writes the stacks.
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

PARTS = 10  # looks in the time after which a run counts as stalled
OURS = ("training", "inference", "seq2seq", "tokenizer_image")


class Watchdog:
    """Of one process. `beat` after each step; `seconds` 0 turns it off."""

    def __init__(self, run_dir: Path, group: Processes, seconds: float) -> None:
        self.seconds, self.rank, self.world_size = seconds, group.rank, group.world_size
        self._folder = run_dir / "incidents"
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._paused = False
        self._moved_at, self._step = time.monotonic(), 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is open, steps must follow one another within `seconds`."""
        if not self.seconds:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._moved_at = time.monotonic()
        stacks = self._folder / f"rank{self.rank}.stacks.txt"
        with stacks.open("w", encoding="utf-8") as file:
            thread = threading.Thread(target=self._watch, args=(file,), name="watchdog", daemon=True)
            thread.start()
            try:
                yield
            finally:
                self._ended.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
        self._state_file(self.rank).unlink(missing_ok=True)
        if not stacks.stat().st_size:
            stacks.unlink()

    def beat(self, step: int) -> None:
        """A step is done."""
        self._moved_at, self._step = time.monotonic(), step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that may take its time: sampling, saving."""
        self._paused = True
        try:
            yield
        finally:
            self._moved_at, self._paused = time.monotonic(), False

    def _watch(self, file: TextIO) -> None:
        said = False
        while not self._ended.wait(self.seconds / PARTS):
            faulthandler.dump_traceback_later(self.seconds, file=file)
            still = 0.0 if self._paused else time.monotonic() - self._moved_at
            where = _place(sys._current_frames().get(self._main))
            write_text_atomic(self._state_file(self.rank), json.dumps({"step": self._step, "where": where}))
            if still <= self.seconds:
                said = False
            elif not said:
                said = True
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                self._speak(f"no step was finished for {still:.0f} s (train.stall_seconds {self.seconds:g}): "
                            f"{self._ranks()}; stacks are in {self._folder}", logging.WARNING)
            elif still > 2 * self.seconds:
                self._speak(f"error: the run stands still: {self._ranks()}; it ends here; the same command goes on from the "
                            "last checkpoint", logging.ERROR)
                os._exit(1)  # the main thread waits inside a library for a process that will not answer

    def _ranks(self) -> str:
        """What every rank is doing, in words."""
        return ", ".join(f"rank {rank} {self._doing(rank)}" for rank in range(self.world_size))

    def _doing(self, rank: int) -> str:
        state = self._answer(rank)
        return f"after step {state['step']} at {state['where']}" if state else "does not answer"

    def _answer(self, rank: int) -> dict[str, Any] | None:
        """What a rank last wrote, if that is not long ago."""
        path = self._state_file(rank)
        try:
            if time.time() - path.stat().st_mtime > max(2.0, self.seconds / 2):
                return None
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _speak(self, message: str, level: int) -> None:
        """The first rank that answers says it."""
        if all(self._answer(rank) is None for rank in range(self.rank)):
            print(f"training: {message}", file=sys.stderr, flush=True) if level == logging.ERROR else log.warning("%s", message)

    def _state_file(self, rank: int) -> Path:
        return self._folder / f".rank{rank}.json"


def _place(frame: FrameType | None) -> str:
    """`file:line function` of the innermost call in our own packages, or of the innermost of all."""
    innermost = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(part in OURS for part in path.parts[-3:-1]):
            return f"{path.parent.name}/{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "nowhere" if innermost is None else f"{innermost.f_code.co_filename}:{innermost.f_lineno}"
