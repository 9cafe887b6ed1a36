"""Images as the tokenizer and matcher trainings read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.visits.order import ItemId, item_random


class Dropped(NamedTuple):
    """An unusable item: its key and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class PixelItem:
    """One visit of a picture: pixels [S, S, 3] uint8, and the unusable items that were passed over for it."""

    pixels: numpy.ndarray
    dropped: list[Dropped] = field(default_factory=list)


class ImageVisits(torch.utils.data.Dataset):
    """Pictures by ItemId at one size. An unusable picture is reported and the next one takes its place."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int, horizontal_flip: float) -> None:
        self.source, self.resolution, self.seed, self.horizontal_flip = source, resolution, seed, horizontal_flip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> PixelItem:
        dropped: list[Dropped] = []
        for offset in range(len(self.source)):
            index = (item.index + offset) % len(self.source)
            try:
                pixels = image_to_pixels(self.source[index].image, self.resolution)
            except BAD_ITEM_ERRORS as error:
                dropped.append(Dropped(self.source.key(index), error.reason))
                continue
            if self.horizontal_flip and item_random(self.seed, item, "flip").random() < self.horizontal_flip:
                pixels = numpy.ascontiguousarray(pixels[:, ::-1])
            return PixelItem(pixels, dropped)
        raise DataError("not one picture of the data can be read; look with `tokenloom data check`")


class PixelBatch(NamedTuple):
    """image [B, 3, S, S] in [-1, 1] and the unusable items met on the way."""

    image: Tensor
    dropped: list[Dropped]


def collate_pixels(items: Sequence[PixelItem]) -> PixelBatch:
    """Stack visits into a batch."""
    pixels = torch.from_numpy(numpy.stack([item.pixels for item in items]))
    return PixelBatch(pixels_to_float(pixels), [d for item in items for d in item.dropped])
