"""Count unusable images of a run over all processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from tokenloom_common.errors import DataError
from training.config.run import PicturesConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.drops import DropCounter, in_words
from training.data.visits.images import Dropped
from training.engine.processes import Processes

log = logging.getLogger(__name__)


def count_opened(counter: DropCounter, source: CaptionedImages, group: Processes) -> None:
    """Count what a source found when it was opened: every process knows how many rows there are, the first one counts the
    unusable ones. DataError on all processes when they are too many."""
    problem: Exception | None = None
    try:
        counter.record_opened(source, group.is_first)
    except DataError as error:
        problem = error
    group.raise_together(problem)


class PictureDrops:
    """Unusable pictures that a training meets, each counted once however often its turn comes."""

    def __init__(self, data: PicturesConfig, source: CaptionedImages, group: Processes) -> None:
        self._counter = DropCounter(data.path, data.max_bad_fraction)
        self._group = group
        self._known: set[str] = set()
        self.problem: Exception | None = None
        """Set when this process met more of them than data.max_bad_fraction allows."""
        count_opened(self._counter, source, group)

    def count(self, dropped: Iterable[Dropped]) -> None:
        """Those that were passed over for a batch."""
        try:
            for one in dropped:
                if one.key not in self._known:
                    self._known.add(one.key)
                    self._counter.record(one.reason, one.key, seen_before=True)
        except DataError as error:
            self.problem = error

    def total(self) -> int:
        """How many, over all processes. All of them must call it."""
        return int(self._group.total(torch.tensor(self._counter.dropped)))

    def say(self) -> None:
        """Log how many there were, and why. All processes must call it."""
        reasons: Counter[str] = sum(self._group.gather(self._counter.reasons), Counter())
        if reasons and self._group.is_first:
            log.warning("passed over %d unusable pictures (%s)", reasons.total(), in_words(reasons))
