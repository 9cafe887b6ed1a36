"""Encode the captioned images of one token shard: read, cut into views, turn into tokens, write."""

# Axes: B images, V views, S pixels of a side, N image tokens, L layout tokens

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset

from tokenizer_image import ImageTokenizer
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import pixels_to_float
from training.config.encoding import EncodeRunConfig
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import DropCounter
from training.data.tokens.encoding_progress import FAILURE_MARK, FinishedShard, Shard, mark_done
from training.data.tokens.layouts import Layouts
from training.data.tokens.shards import ShardFile, token_dtype, write_shard
from training.data.tokens.views import image_views, view_names
from training.data.visits.loader import reraising_loader


class OthersFailedError(Exception):
    """Another process met an error and will report it."""


class RowViews(NamedTuple):
    """A row, read; no views if it is unusable."""

    key: str
    captions: list[str]
    views: numpy.ndarray | None  # [V, S, S, 3] uint8
    layouts: numpy.ndarray | None  # [V, L] uint16
    reason: str = ""  # why it is unusable


class RowViewsDataset(Dataset):
    """Rows of a split, ready to be encoded."""

    def __init__(self, source: CaptionedImages, resolution: int, config: EncodeRunConfig) -> None:
        self.source, self.resolution, self.config = source, resolution, config
        self.layouts = Layouts(config.layout) if config.layout.kind != "none" else None

    def __getitem__(self, row: int) -> RowViews:
        try:
            item = self.source[row]
            views = image_views(item.image, self.resolution, self.config.views)
            layouts = None
            if self.layouts is not None:
                mirror = self.config.views.flip
                layouts = self.layouts.view_layouts(self.source, row, views, mirror)
        except BAD_ITEM_ERRORS as error:
            return RowViews(self.source.key(row), [], None, None, error.reason)
        return RowViews(item.key, list(item.captions), views, layouts)


class ShardEncoder:
    """Writes shards into `aside`, and counts the unusable images of this process in `drops`."""

    def __init__(self, tokenizer: ImageTokenizer, config: EncodeRunConfig, aside: Path,
                 drops: DropCounter, device: torch.device) -> None:
        self.tokenizer, self.config, self.aside = tokenizer, config, aside
        self.drops, self.device = drops, device

    def row_bytes(self) -> int:
        """Return the least bytes of a row: those of its tokens, without captions and key."""
        tokens = math.prod(self.tokenizer.grid) * len(view_names(self.config.views))
        return tokens * token_dtype(self.tokenizer.codebook_size).itemsize

    def encode(self, source: CaptionedImages, shard: Shard, bar: Any) -> FinishedShard:
        """Encode and write the rows of `shard`. OthersFailedError if another process has failed."""
        rows: list[RowViews] = []
        tokens: list[numpy.ndarray] = []
        dropped: list[tuple[str, str]] = []
        dataset = RowViewsDataset(source, self.tokenizer.config.resolution, self.config)
        # `list` as collate function: torch's would stack rows, and unusable ones have no views
        for batch in reraising_loader(dataset, list, sampler=shard.rows,
                                      batch_size=self.config.batch_size,
                                      num_workers=self.config.workers):
            if any(self.aside.glob(f"{FAILURE_MARK}*")):
                raise OthersFailedError

            unusable = [(row.key, row.reason) for row in batch if row.views is None]
            self.count(unusable)  # before the costly step: may raise
            dropped += unusable
            usable = [row for row in batch if row.views is not None]
            if usable:
                tokens.append(self._tokens(numpy.stack([row.views for row in usable])))
                # without the pixels, which would fill the memory until the shard is whole
                rows += [row._replace(views=None) for row in usable]
            bar.update(len(batch))

        file = self._write(shard, rows, tokens) if rows else None
        done = FinishedShard(file, dropped)
        mark_done(self.aside, shard, done)
        return done

    def count(self, dropped: list[tuple[str, str]]) -> None:
        """Count unusable images by key and reason. DataError when they are too many."""
        for key, reason in dropped:
            self.drops.record(reason, key, seen_before=True)

    def _tokens(self, views: numpy.ndarray) -> numpy.ndarray:
        """Pixels [B, V, S, S, 3] uint8 -> tokens [B, V * N]."""
        image = pixels_to_float(views.reshape(-1, *views.shape[2:]))  # [B * V, 3, S, S]
        # views multiply the images: encode batch_size at a time, or memory depends on V
        parts = [self.tokenizer.encode(part.to(self.device)).cpu()
                 for part in image.split(self.config.batch_size)]
        tokens = codes_to_tokens(torch.cat(parts)).numpy()  # [B * V, N]
        return tokens.astype(token_dtype(self.tokenizer.codebook_size)).reshape(len(views), -1)

    def _write(self, shard: Shard, rows: list[RowViews], tokens: list[numpy.ndarray]) -> ShardFile:
        captions = [row.captions for row in rows]
        keys = [row.key for row in rows]
        flat = [row.layouts.reshape(-1) for row in rows if row.layouts is not None]  # [V * L] each
        layouts = numpy.stack(flat) if flat else None
        return write_shard(self.aside / shard.name, captions, numpy.concatenate(tokens), keys,
                           layouts)
