"""When a stream may stop for a preview: all previews together stay within a share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
SHARE = 0.035
"""Of the time without previews. 5 % is promised; that caches a preview swept slow the next steps is not on its clock."""


class PreviewBudget:
    """Counts the time of decoding and of previews.

    longest: seconds that a preview takes, where one is known from before. While none is, the first waits for half the tokens.
    """

    def __init__(self, longest: float = 0.0, share: float = SHARE, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._clock = share, clock
        self._start = clock()
        self._not_ours = 0.0
        self.preview_seconds = 0.0
        self.longest = longest

    @property
    def decoding_seconds(self) -> float:
        """Since the start, without previews and without what callers did."""
        return self._clock() - self._start - self._not_ours

    def allows(self, done: int, total: int) -> bool:
        """Whether one more preview, as long as the longest so far, stays within the share of the time so far."""
        if not self.longest:
            return 2 * done >= total
        return self.preview_seconds + self.longest <= self.share * self.decoding_seconds

    def spent_on(self, preview: Callable[[], Result]) -> Result:
        """Run a preview and count it."""
        start = self._clock()
        result = preview()
        taken = self._clock() - start
        self.preview_seconds += taken
        self.longest = max(self.longest, taken)
        return result

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time that is not decoding's."""
        start = self._clock()
        try:
            yield
        finally:
            self._not_ours += self._clock() - start
