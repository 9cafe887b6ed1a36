"""An engine's limits, its figures, and how fast it draws."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW = 10
"""Seconds that a speed looks back."""
UNKNOWN_WAIT = 5.0
"""Seconds to wait before anything was drawn, when nobody knows the speed."""


@dataclass(frozen=True)
class EngineLimits:
    """queue: jobs that may wait for their turn. deadline: seconds from a job's submission to its
    last image. kept_images: finished images that `words` can be asked about. turn: seconds that a
    model may draw its own jobs before it makes room for one that does not fit beside it.
    """

    queue: int = 32
    deadline: float = 120.0
    kept_images: int = 256
    turn: float = 5.0


@dataclass(frozen=True)
class EngineStats:
    """Figures of this moment, and the tokens since the start.

    queued: jobs that wait. loaded: names of models; model_bytes: their predicted memory.
    """

    queued: int
    active_rows: int
    rows: int
    tokens: int
    tokens_per_second: float
    loaded: tuple[str, ...] = ()
    model_bytes: int = 0


@dataclass
class _Second:
    number: int
    tokens: int = 0
    busy: float = 0.0  # seconds spent drawing


class Speed:
    """Counts tokens by seconds of a clock; holds WINDOW of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.tokens_per_busy_second = 0.0
        """Over the last WINDOW seconds in which anything was drawn; 0 before."""
        self._seconds: deque[_Second] = deque(maxlen=WINDOW)

    def add(self, tokens: int, start: float, end: float) -> None:
        """Count the tokens of a step."""
        self.tokens += tokens
        if not self._seconds or self._seconds[-1].number != int(end):
            self._seconds.append(_Second(int(end)))
        self._seconds[-1].tokens += tokens
        self._seconds[-1].busy += end - start
        busy = sum(second.busy for second in self._seconds)
        if busy:
            self.tokens_per_busy_second = sum(second.tokens for second in self._seconds) / busy

    def seconds_for(self, tokens: int) -> float:
        """Return the seconds that so many tokens should take, at least 1."""
        if not self.tokens_per_busy_second:
            return UNKNOWN_WAIT
        return max(1.0, tokens / self.tokens_per_busy_second)

    def lately(self, now: float) -> float:
        """Tokens per second of the clock, idle time included."""
        recent = [second for second in list(self._seconds) if second.number > int(now) - WINDOW]
        return sum(second.tokens for second in recent) / WINDOW
