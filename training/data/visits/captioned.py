"""Captioned pictures as the training of a matcher reads them."""

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
from training.data.visits.images import Dropped, ImageVisits, PixelItem
from training.data.visits.order import ItemId, item_random
from training.data.visits.tokens import Captions


@dataclass(frozen=True)
class CaptionedItem:
    """One visit of a picture with one of its captions."""

    item: ItemId
    picture: PixelItem
    caption: str


class CaptionedVisits(torch.utils.data.Dataset):
    """Pictures and one of their captions by ItemId. An unusable picture is reported and the next one takes its place."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int, horizontal_flip: float) -> None:
        self.source, self.seed = source, seed
        self.pictures = ImageVisits(source, resolution, seed, horizontal_flip)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> CaptionedItem:
        picture = self.pictures[item]
        row = (item.index + len(picture.dropped)) % len(self.source)  # each one passed over is one further
        return CaptionedItem(item, picture, item_random(self.seed, item, "caption").choice(self.source.captions(row)))


class CaptionedBatch(NamedTuple):
    """image [B, 3, S, S] in [-1, 1]; text; same_caption [B, B] bool: which rows have equal captions; masked: the text with
    words hidden, for runs that predict them; the unusable items met on the way."""

    image: Tensor
    text: TextBatch
    same_caption: Tensor
    masked: MaskedText | None
    dropped: list[Dropped]


class CollateCaptioned:
    """Stack visits into a CaptionedBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: Captions, seed: int, masked_vocab_size: int | None = None) -> None:
        """masked_vocab_size: of the text ids, in runs that hide some of them."""
        self.text_source, self.seed, self.masked_vocab_size = text_source, seed, masked_vocab_size

    def __call__(self, items: Sequence[CaptionedItem]) -> CaptionedBatch:
        image = pixels_to_float(numpy.stack([item.picture.pixels for item in items]))
        text = self.text_source.encode([item.caption for item in items])
        masked = None
        if self.masked_vocab_size is not None:
            masked = self._masked(text.text_input, self.masked_vocab_size, items)
        dropped = [one for item in items for one in item.picture.dropped]
        return CaptionedBatch(image, text, same_captions([item.caption for item in items]), masked, dropped)

    def _masked(self, text_ids: Tensor, vocab_size: int, items: Sequence[CaptionedItem]) -> MaskedText:
        """Each row with random numbers of its own, so that a resumed run hides the same words."""
        generators = [torch.Generator().manual_seed(item_random(self.seed, one.item, "mask").getrandbits(63)) for one in items]
        rows = [mask_text(ids, vocab_size, generator) for ids, generator in zip(text_ids, generators, strict=True)]
        return MaskedText(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def same_captions(captions: Sequence[str]) -> Tensor:
    """[B, B] bool: which captions are equal, whatever their case."""
    numbers: dict[str, int] = {}
    of_each = torch.tensor([numbers.setdefault(caption.casefold(), len(numbers)) for caption in captions])
    return of_each[:, None] == of_each[None, :]
