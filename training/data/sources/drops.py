"""Unusable items: name and count them by reason; too many make the data as a whole unusable."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from tokenloom_common.errors import DataError, UserError

DOWNLOAD_FAILED = "download failed"  # the reason of items that never arrived
ALWAYS_TOLERATED = 10  # a few bad items never stop a run, however small the data


class BadItem(NamedTuple):
    """An item that cannot be used: its name and the reason, short enough to be counted."""

    key: str
    reason: str


class BadItemError(UserError):
    """An item is unusable for a reason other than the bytes of its image. `reason` is countable."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {reason}: {detail}")
        self.reason = reason
        self._parts = (name, reason, detail)

    def __reduce__(self):
        # pickle would call the class with the message alone, and workers send errors pickled
        return type(self), self._parts


def format_reasons(reasons: Counter) -> str:
    """Format as '2 truncated, 1 too small', the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def check_bad_fraction(max_bad_fraction: float) -> None:
    """UserError for a share that is none."""
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise UserError(f"--data.max_bad_fraction {max_bad_fraction}: must lie in 0 to 1")


class DropCounter:
    """Counts items seen and dropped while data is read once; raises when too many are bad.

    The limit is max(10, `max_bad_fraction` * items seen). Failed downloads are no damage: they are
    counted in `failed_downloads` alone.
    """

    def __init__(self, where: str, max_bad_fraction: float = 0.01) -> None:
        check_bad_fraction(max_bad_fraction)
        self.where = where
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.reasons: Counter = Counter()
        self.items: list[BadItem] = []
        self.opened: Counter = Counter()
        """Those of `reasons` that were found when the source was opened."""
        self.failed_downloads = 0

    @property
    def dropped(self) -> int:
        """Number of dropped items."""
        return self.reasons.total()

    def record_good(self, count: int = 1) -> None:
        """Count usable items."""
        self.seen += count

    def record(self, reason: str, key: str = "", seen_before: bool = False) -> None:
        """Count one dropped item. DataError above the limit, naming the reasons and the last item.

        seen_before: it was counted as usable when its source was opened.
        """
        if not seen_before:
            self.seen += 1
        if reason == DOWNLOAD_FAILED:
            self.failed_downloads += 1
            return
        self.reasons[reason] += 1
        self.items.append(BadItem(key, reason))

        limit = max(ALWAYS_TOLERATED, self.max_bad_fraction * self.seen)
        if self.dropped > limit:
            raise DataError(f"{self.where}: {self.summary()}, more than --data.max_bad_fraction "
                            f"{self.max_bad_fraction:g} allows (last: {key}); look with "
                            "`tokenloom data check`")

    def record_opened(self, source: Any, first: bool = True) -> None:
        """Count the items of a CaptionedImages and those found unusable when it was opened.

        first: the one process, of those that opened the source, that counts the unusable items.
        """
        self.record_good(len(source))
        if not first:  # but its own bad items are still a share of the whole source
            self.seen += len(source.bad_items)
            return
        for item in source.bad_items:
            self.opened[item.reason] += 1
            self.record(item.reason, item.key)

    def summary(self) -> str:
        """Format as 'dropped 3 of 9,000 (2 truncated, 1 too small)'."""
        reasons = f" ({format_reasons(self.reasons)})" if self.reasons else ""
        return f"dropped {self.dropped:,} of {self.seen:,}{reasons}"
