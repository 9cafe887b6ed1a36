"""Captioned pictures as a run's config asks for them, the order in which it visits them, and those it could not use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from tokenloom_common.errors import DataError
from training.config.run import DataConfig, PicturesConfig
from training.config.seq2seq import TokenDataConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.drops import DropCounter, in_words
from training.data.sources.open_dataset import open_dataset
from training.data.tokens.shards import TokenShards
from training.data.visits.images import Dropped
from training.data.visits.on_the_fly import PictureTokens
from training.data.visits.order import DataOrder
from training.engine.processes import Processes

log = logging.getLogger(__name__)

SHUFFLE_ROWS = 4096  # of streams: 400 MB of photographs a loader process
TOKEN_SHUFFLE_ROWS = 1 << 20  # of token shards: 500 MB of 256 tokens, which the page cache keeps for all processes


def open_pictures(data: PicturesConfig, split: str | None, keep_rows: int = 1) -> CaptionedImages:
    """One split of the data. keep_rows: of streams, what is kept in memory beside the row group that is read.

    Errors as from `open_dataset`.
    """
    return open_dataset(data.path, split=split, caption_column=data.caption_column, image_column=data.image_column,
                        streamed_rows=keep_rows if data.streaming else 0)


def open_training_pictures(data: DataConfig, split: str | None) -> CaptionedImages:
    """One split, with as much kept in memory as is shuffled together."""
    return open_pictures(data, split, data.shuffle_rows or SHUFFLE_ROWS)


def token_order(data: TokenDataConfig, rows: PictureTokens | TokenShards, seed: int) -> DataOrder:
    """How a transformer's run visits its data: token shards in buckets of neighbours when they are many."""
    if isinstance(rows, PictureTokens):
        return picture_order(data, rows.source, seed)
    return DataOrder(len(rows), seed, data.shuffle_rows or TOKEN_SHUFFLE_ROWS)


def picture_order(data: DataConfig, source: CaptionedImages, seed: int) -> DataOrder:
    """How a run visits them: shuffled as a whole, or bucket after bucket of what lies together."""
    return DataOrder(len(source), seed, (data.shuffle_rows or SHUFFLE_ROWS) if data.streaming else 0, source.runs)


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
