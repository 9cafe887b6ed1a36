"""Captioned pictures as a run's config asks for them, the order in which it visits them, and those it could not use."""

from __future__ import annotations

from training.config.run import DataConfig, PicturesConfig
from training.config.seq2seq import TokenDataConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.data.tokens.shards import TokenShards
from training.data.visits.on_the_fly import PictureTokens
from training.data.visits.order import DataOrder

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


