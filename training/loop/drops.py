"""Count unusable images of a run over all processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from tokenloom_common.errors import DataError
from training.config.run import PicturesConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.drops import BadItem, DropCounter, format_reasons
from training.engine.processes import Processes

log = logging.getLogger(__name__)


def count_opened(counter: DropCounter, source: CaptionedImages, group: Processes) -> None:
    """Count the rows of a source that was opened, and on the first process its unusable ones.

    DataError on all processes when they are too many.
    """
    problem: Exception | None = None
    try:
        counter.record_opened(source, group.is_first)
    except DataError as error:
        problem = error
    group.raise_together(problem)
    if source.left_out and group.is_first:
        log.info("%s: left out: %s", source.path, format_reasons(source.left_out))


class PictureDrops:
    """Unusable images that a run meets, each counted once however often it is visited."""

    def __init__(self, data: PicturesConfig, source: CaptionedImages, group: Processes) -> None:
        self._counter = DropCounter(data.path, data.max_bad_fraction)
        self._group = group
        self._known: set[str] = set()  # keys, since every epoch meets the same ones again
        self.problem: Exception | None = None
        """Set when this process met more of them than data.max_bad_fraction allows."""
        count_opened(self._counter, source, group)

    def count(self, dropped: Iterable[BadItem]) -> None:
        """Count the items that were passed over for a batch."""
        try:
            for item in dropped:
                if item.key not in self._known:
                    self._known.add(item.key)
                    self._counter.record(item.reason, item.key, seen_before=True)
        except DataError as error:
            self.problem = error  # raised between steps, where all processes can raise it together

    def total(self) -> int:
        """Return their number over all processes. All of them must call it."""
        return int(self._group.total(torch.tensor(self._counter.dropped)))

    def say(self) -> None:
        """Log how many there were, and why. All processes must call it."""
        failed = sum(self._group.gather(self._counter.failed_downloads))
        if failed and self._group.is_first:  # of data that is read in place
            log.info("left out: %s downloads failed", f"{failed:,}")
        reasons: Counter[str] = sum(self._group.gather(self._counter.reasons), Counter())
        if reasons and self._group.is_first:
            log.warning("passed over %d unusable pictures (%s)", reasons.total(),
                        format_reasons(reasons))
