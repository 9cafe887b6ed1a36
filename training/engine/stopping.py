"""Signals that end a run from outside: SIGTERM, Ctrl-C, and a launcher that went away unnoticed."""

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

SAME_REQUEST_SECONDS = 1.0  # in which further signals belong to the first one
LOOK_SECONDS = 1.0  # between looks at the launcher, which read /proc

STARTED_ALONE = "TOKENLOOM_ALONE"
"""Set where there is no launcher; training.engine.launch then sets the launcher's other names."""


class StopFlag:
    """The signal that asks this process to stop, 0 while none does."""

    def __init__(self, launcher: Launcher | None = None) -> None:
        self._signal = 0
        self._first_at = 0.0
        self._launcher = launcher

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal: the first sets the flag; one a second later ends the program at once.

        Ctrl-C under a launcher arrives twice: from the terminal, and as the launcher's SIGTERM
        right behind it.
        """
        if not self._signal:
            # the time first: Python may run another signal's handler between these two lines
            self._first_at = time.monotonic()
            self._signal = number
        elif time.monotonic() - self._first_at > SAME_REQUEST_SECONDS:
            # the default action, so that whoever waits for this process sees the signal
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def signal(self) -> int:
        """The signal; SIGTERM once the launcher is gone: nobody else would end this process."""
        if not self._signal and self._launcher is not None and self._launcher.gone():
            log.warning("the launcher is gone; saving a checkpoint and ending")
            self._signal = int(signal.SIGTERM)
        return self._signal


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Let SIGTERM and SIGINT set the flag while this is open."""
    # a process without a launcher has LOCAL_RANK too, set by training.engine.launch; its parent
    # is a shell, which may go
    has_launcher = "LOCAL_RANK" in os.environ and os.environ.get(STARTED_ALONE) is None
    flag = StopFlag(Launcher() if has_launcher else None)
    before = {}  # set back afterwards: another run may follow in this process
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, flag.note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Launcher:
    """The processes above this one that must live as long as it does.

    `deepspeed` starts `launch.py`, which starts the ranks; SIGTERM to `deepspeed` ends it alone and
    would leave the ranks running. Other launchers are the parent itself, and the process that
    started them may go.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._parent = os.getppid()
        self._above: int | None = None
        if _is_deepspeeds(proc, self._parent):
            self._above = _parent_of(proc, self._parent)
        self._looked_at = 0.0

    def gone(self) -> bool:
        """Whether one of them ended; looks at most once a second."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = now
        if os.getppid() != self._parent:  # an orphan is given to another process
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
    # "pid (name) state parent ...": the name may hold anything, also brackets and spaces
    _, _, after_name = stat.rpartition(")")
    _, parent, *_ = after_name.split()
    return int(parent)
