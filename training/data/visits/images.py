"""Visits of images without captions, for training image tokenizers."""

# Axes: B batch, S side in pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import BadItem
from training.data.visits.order import ItemId, item_random


@dataclass(frozen=True)
class PixelItem:
    """One visit of an image."""

    pixels: numpy.ndarray  # [S, S, 3] uint8
    index: int  # of the row that was read; the visit's own where nothing was passed over
    dropped: list[BadItem]  # passed over on the way


class ImageVisits(torch.utils.data.Dataset):
    """Images by ItemId at one size. The next row replaces an unusable one, which is reported."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int,
                 horizontal_flip: float) -> None:
        self.source = source
        self.resolution = resolution
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> PixelItem:
        dropped: list[BadItem] = []
        for offset in range(len(self.source)):
            index = (item.index + offset) % len(self.source)
            try:
                pixels = image_to_pixels(self.source[index].image, self.resolution)
            except BAD_ITEM_ERRORS as error:
                dropped.append(BadItem(self.source.key(index), error.reason))
                continue

            # keyed by the visit, not by the row that replaces it
            if self.horizontal_flip:
                flip = item_random(self.seed, item, "flip").random() < self.horizontal_flip
                if flip:
                    pixels = numpy.ascontiguousarray(pixels[:, ::-1])
            return PixelItem(pixels, index, dropped)
        raise DataError("not one picture of the data can be read; look with `tokenloom data check`")


class PixelBatch(NamedTuple):
    """image [B, 3, S, S] in [-1, 1], and the unusable items that were passed over."""

    image: Tensor
    dropped: list[BadItem]


def collate_pixels(items: Sequence[PixelItem]) -> PixelBatch:
    """Stack visits into a batch."""
    pixels = torch.from_numpy(numpy.stack([item.pixels for item in items]))
    dropped = [bad for item in items for bad in item.dropped]
    return PixelBatch(pixels_to_float(pixels), dropped)
