"""Time several implementations against each other, within a budget of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

Name = TypeVar("Name")
Clock = Callable[[], float]


class Budget:
    """Seconds that all measurements under it may take together; None = as long as they need."""

    def __init__(self, seconds: float | None, clock: Clock = time.perf_counter) -> None:
        self.seconds = seconds
        self.clock = clock
        self._spent = 0.0
        self._since: float | None = None  # the clock when the running measurement began

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the seconds of the block; a block inside another counts once."""
        if self._since is not None:
            yield
            return
        self._since = self.clock()
        try:
            yield
        finally:
            self._spent += self.clock() - self._since
            self._since = None

    @property
    def spent(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._since is None else self.clock() - self._since
        return self._spent + running

    @property
    def is_spent(self) -> bool:
        """Whether no measurement may begin any more."""
        return self.seconds is not None and self.spent >= self.seconds


def fastest(candidates: Mapping[Name, Callable[[], Any]], budget: Budget,
            repeats: int = 5) -> tuple[Name, dict[Name, float]] | None:
    """Return the candidate with the least median time and all medians in seconds.

    Candidates alternate, after one warm-up run each, so that a machine that slows down slows all of
    them. None if the budget ended before each had been timed once; it is looked at between two
    runs, so that it is exceeded by one run at most.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    with budget.spending():
        for run in range(repeats + 1):
            for name, candidate in candidates.items():
                if budget.is_spent:
                    return _best(seconds)
                start = budget.clock()
                candidate()
                if run:  # the first warms up
                    seconds[name].append(budget.clock() - start)
    return _best(seconds)


def _best(seconds: Mapping[Name, list[float]]) -> tuple[Name, dict[Name, float]] | None:
    """Return the name with the least median, and all medians; None if one has no times."""
    if not all(seconds.values()):
        return None
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return min(medians, key=lambda name: medians[name]), medians
