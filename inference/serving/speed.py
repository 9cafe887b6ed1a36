"""How fast an engine draws: tokens per second lately, and while it is drawing."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW = 10
"""Seconds that a speed looks back."""


@dataclass
class _Second:
    number: int
    tokens: int = 0
    busy: float = 0.0  # seconds spent drawing


class Speed:
    """Counts tokens by seconds of a clock; holds WINDOW of them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.while_drawing = 0.0
        """Tokens per second of drawing, over the last WINDOW seconds that had any; 0 before."""
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
            self.while_drawing = sum(second.tokens for second in self._seconds) / busy

    def lately(self, now: float) -> float:
        """Tokens per second of the clock, idle time included."""
        recent = [second for second in list(self._seconds) if second.number > int(now) - WINDOW]
        return sum(second.tokens for second in recent) / WINDOW
