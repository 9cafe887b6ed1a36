"""Unusable items: counted by reason, named, and a limit above which the data as a whole is called unusable."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from tokenloom_common.errors import DataError, UserError

ALWAYS_TOLERATED = 10  # a few bad items never stop a run, however small the data


class BadItem(NamedTuple):
    """An item that cannot be used: its name and the reason, short enough to be counted."""

    key: str
    reason: str


class BadItemError(UserError):
    """An item that cannot be used for a reason other than its picture's bytes. `reason` is countable."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {reason}: {detail}")
        self.reason = reason
        self._parts = (name, reason, detail)

    def __reduce__(self):  # the message alone does not rebuild it, and workers send errors pickled
        return type(self), self._parts


def in_words(reasons: Counter) -> str:
    """'2 truncated, 1 too small', the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


class DropCounter:
    """Counts items seen and dropped while data is read once; raises when too many are bad.

    The limit is max(10, `max_bad_fraction` * items seen).
    """

    def __init__(self, where: str, max_bad_fraction: float = 0.01) -> None:
        if not 0.0 <= max_bad_fraction <= 1.0:
            raise UserError(f"max_bad_fraction {max_bad_fraction}: must lie in 0 to 1")
        self.where = where
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.reasons: Counter = Counter()
        self.items: list[BadItem] = []
        self.opened: Counter = Counter()
        """Those of `reasons` that were found when the source was opened."""

    @property
    def dropped(self) -> int:
        """How many items were dropped."""
        return self.reasons.total()

    def record_good(self, count: int = 1) -> None:
        """Count usable items."""
        self.seen += count

    def record(self, reason: str, key: str = "", seen_before: bool = False) -> None:
        """Count one dropped item. DataError above the limit, naming the reasons and the last item.

        seen_before: it was counted as usable when its source was opened.
        """
        self.seen += not seen_before
        self.reasons[reason] += 1
        self.items.append(BadItem(key, reason))
        if self.dropped > max(ALWAYS_TOLERATED, self.max_bad_fraction * self.seen):
            raise DataError(f"{self.where}: {self.summary()}, more than max_bad_fraction {self.max_bad_fraction:g} "
                            f"allows (last: {key}); look with `tokenloom data check`")

    def record_opened(self, source: Any, first: bool = True) -> None:
        """Count what a source (CaptionedImages) found when it was opened: its items, and those it could not use.

        first: of the processes that opened it, the one that counts the unusable ones.
        """
        self.record_good(len(source))
        if not first:
            self.seen += len(source.bad_items)
            return
        for item in source.bad_items:
            self.opened[item.reason] += 1
            self.record(item.reason, item.key)

    def summary(self) -> str:
        """'dropped 3 of 9,000 (2 truncated, 1 too small)'."""
        reasons = f" ({in_words(self.reasons)})" if self.reasons else ""
        return f"dropped {self.dropped:,} of {self.seen:,}{reasons}"
