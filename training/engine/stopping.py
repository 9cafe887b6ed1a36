"""What ends a run from outside: SIGTERM, Ctrl-C, and a launcher that went away without telling its processes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SAME_REQUEST_SECONDS = 1.0
LOOK_SECONDS = 1.0


class StopFlag:
    """The signal that asks this process to stop, 0 while none does."""

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._signal, self._first_at = 0, 0.0
        self._launcher = launcher

    def note(self, number: int, frame: Any) -> None:
        """A signal: the first sets the flag; a second one, a second later, ends the program at once.

        Ctrl-C under a launcher arrives twice: from the terminal, and as the launcher's SIGTERM right behind it.
        """
        if not self._signal:
            self._signal, self._first_at = number, time.monotonic()
        elif time.monotonic() - self._first_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def signal(self) -> int:
        """Also SIGTERM once the launcher is gone: nobody else would ever end this process."""
        if not self._signal and self._launcher is not None and self._launcher.gone():
            log.warning("the launcher is gone; saving a checkpoint and ending")
            self._signal = int(signal.SIGTERM)
        return self._signal


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT set the flag while this is open."""
    flag = StopFlag(Launcher() if "LOCAL_RANK" in os.environ and os.environ.get(STARTED_ALONE) is None else None)
    before = {number: signal.signal(number, flag.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STARTED_ALONE = "TOKENLOOM_ALONE"
"""Set where there is no launcher (`training.engine.processes` sets the launcher's other names itself)."""


class Launcher:
    """The processes above this one that must live as long as it does.

    `deepspeed` starts `launch.py`, which starts the ranks; SIGTERM to `deepspeed` ends it alone and would leave the ranks
    running. Other launchers are the parent itself, and what started them may go.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc, self._parent = proc, os.getppid()
        self._above = _parent_of(proc, self._parent) if _is_deepspeeds(proc, self._parent) else None
        self._looked_at = 0.0

    def gone(self) -> bool:
        """Whether one of them ended; looks at most once a second."""
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = time.monotonic()
        if os.getppid() != self._parent:
            return True
        return self._above is not None and _parent_of(self._proc, self._parent) != self._above


def _is_deepspeeds(proc: Path, process: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in (proc / str(process) / "cmdline").read_bytes()
    except OSError:
        return False


def _parent_of(proc: Path, process: int) -> int | None:
    """The parent of a process; None without /proc, or when it has ended."""
    try:
        stat = (proc / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name, in brackets, may hold anything
