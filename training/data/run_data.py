"""Open the captioned images that a run's config names, and order its visits."""

from __future__ import annotations

from training.config.run import DataConfig, PicturesConfig
from training.config.seq2seq import TokenDataConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.data.tokens.shards import TokenShards
from training.data.visits.on_the_fly import OnTheFlyTokens
from training.data.visits.order import DataOrder

SHUFFLE_ROWS = 4096  # of streams: 400 MB of photographs per loader process
TOKEN_SHUFFLE_ROWS = 1 << 20  # 500 MB of 256 tokens each, in the page cache shared by all


def open_images(data: PicturesConfig, split: str | None, keep_rows: int = 1) -> CaptionedImages:
    """Open one split of the data; errors as from `open_dataset`.

    keep_rows: rows of a stream to keep in memory, beside the row group that is read.
    """
    return open_dataset(data.path, split=split, streamed_rows=keep_rows if data.streaming else 0,
                        **data.reading())


def open_training_images(data: DataConfig, split: str | None) -> CaptionedImages:
    """Open one split, keeping as many rows in memory as are shuffled together."""
    return open_images(data, split, data.shuffle_rows or SHUFFLE_ROWS)


def token_order(data: TokenDataConfig, rows: OnTheFlyTokens | TokenShards, seed: int) -> DataOrder:
    """Return the order in which a transformer's run visits its data; many token rows in buckets."""
    if isinstance(rows, OnTheFlyTokens):
        return image_order(data, rows.source, seed)
    return DataOrder(len(rows), seed, data.shuffle_rows or TOKEN_SHUFFLE_ROWS)


def image_order(data: DataConfig, source: CaptionedImages, seed: int) -> DataOrder:
    """Return the order in which a run visits images: shuffled as a whole, or streams in buckets."""
    shuffle_rows = 0  # as a whole: rows that the cache holds can be read in any order
    if data.streaming:
        shuffle_rows = data.shuffle_rows or SHUFFLE_ROWS
    return DataOrder(len(source), seed, shuffle_rows, source.chunk_bounds)
