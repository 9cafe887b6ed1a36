"""Visits of captioned images, for training matchers (CLIP)."""

# Axes: B batch, S side in pixels, T text ids

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from seq2seq import TextBatch
from seq2seq.losses import MaskedText, mask_text
from tokenizer_image.images import pixels_to_float
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.drops import BadItem
from training.data.visits.images import ImageVisits, PixelItem
from training.data.visits.order import ItemId, item_random
from training.data.visits.tokens import CaptionEncoder


@dataclass(frozen=True)
class CaptionedItem:
    """One visit of an image with one of its captions."""

    item: ItemId
    image: PixelItem
    caption: str


class CaptionedVisits(torch.utils.data.Dataset):
    """Images with one of their captions, by ItemId. Unusable images as in ImageVisits."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int,
                 horizontal_flip: float) -> None:
        self.source = source
        self.seed = seed
        self.images = ImageVisits(source, resolution, seed, horizontal_flip)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> CaptionedItem:
        image = self.images[item]
        captions = self.source.captions(image.index)  # of the row that replaced an unusable one
        caption = item_random(self.seed, item, "caption").choice(captions)
        return CaptionedItem(item, image, caption)


class CaptionedBatch(NamedTuple):
    """A matcher's batch."""

    image: Tensor  # [B, 3, S, S] in [-1, 1]
    text: TextBatch
    same_caption: Tensor  # [B, B] bool: which rows have equal captions
    masked: MaskedText | None  # the text with ids hidden, for runs that predict them
    dropped: list[BadItem]


class CollateCaptioned:
    """Stack visits into a CaptionedBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: CaptionEncoder, seed: int,
                 masked_vocab_size: int | None = None) -> None:
        """masked_vocab_size: number of text ids, for runs that hide some; None hides none."""
        self.text_source = text_source
        self.seed = seed
        self.masked_vocab_size = masked_vocab_size

    def __call__(self, items: Sequence[CaptionedItem]) -> CaptionedBatch:
        captions = [item.caption for item in items]
        image = pixels_to_float(numpy.stack([item.image.pixels for item in items]))
        text = self.text_source.encode(captions)
        masked = None
        if self.masked_vocab_size is not None:
            masked = self._mask(text.text_input, self.masked_vocab_size, items)
        dropped = [bad for item in items for bad in item.image.dropped]
        return CaptionedBatch(image, text, same_captions(captions), masked, dropped)

    def _mask(self, text_ids: Tensor, vocab_size: int,
              items: Sequence[CaptionedItem]) -> MaskedText:
        rows = []
        for ids, visit in zip(text_ids, items, strict=True):
            # random numbers of the visit's own, so that a resumed run hides the same ids
            seed = item_random(self.seed, visit.item, "mask").getrandbits(63)
            rows.append(mask_text(ids, vocab_size, torch.Generator().manual_seed(seed)))
        return MaskedText(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def same_captions(captions: Sequence[str]) -> Tensor:
    """Compare all pairs of captions, ignoring case: [B, B] bool."""
    numbers: dict[str, int] = {}
    of_each = [numbers.setdefault(caption.casefold(), len(numbers)) for caption in captions]
    ids = torch.tensor(of_each)  # [B], equal for equal captions
    return ids[:, None] == ids[None, :]
