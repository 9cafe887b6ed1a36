"""Data sets as training reads them: one visit of one item, with its own random numbers.

Axes: B batch, S side in pixels, N image tokens, L layout tokens, T text ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from seq2seq import TextBatch
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from training.data.batches import ItemId, item_random
from training.data.sources import BAD_ITEM_ERRORS, CaptionedImages
from training.data.token_shards import TokenShards


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


@dataclass(frozen=True)
class TokenItem:
    """One visit of an encoded picture: its caption ('' = the null caption), tokens [N], what the decoder is fed [N], and its
    layout [L], if any."""

    caption: str
    image_tokens: numpy.ndarray
    input_tokens: numpy.ndarray
    layout: numpy.ndarray | None = None


class TokenVisits(torch.utils.data.Dataset):
    """Encoded pictures by ItemId: one of the captions, dropped to the null caption with a chance of `caption_dropout`.

    A share of `token_corruption` of the tokens that the decoder is fed are random codes (taming-transformers' 1 - pkeep,
    Esser et al. 2021): a model that must not trust every token before it keeps listening to the caption when it samples.
    """

    def __init__(self, shards: TokenShards, seed: int, caption_dropout: float, token_corruption: float = 0.0,
                 first_caption: bool = False, use_layout: bool = True) -> None:
        """first_caption: always a row's first one, which is its class for class-conditional models."""
        self.shards, self.seed, self.first_caption, self.use_layout = shards, seed, first_caption, use_layout
        self.caption_dropout, self.token_corruption = caption_dropout, token_corruption

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: ItemId) -> TokenItem:
        captions = self.shards.captions(item.index)
        caption = captions[0] if self.first_caption else item_random(self.seed, item, "caption").choice(captions)
        if item_random(self.seed, item, "dropout").random() < self.caption_dropout:
            caption = ""
        tokens = self.shards.image_tokens(item.index)
        layout = self.shards.layout(item.index) if self.use_layout else None
        return TokenItem(caption, tokens, self._corrupted(tokens, item), layout)

    def _corrupted(self, tokens: numpy.ndarray, item: ItemId) -> numpy.ndarray:
        if not self.token_corruption:
            return tokens
        draws = numpy.random.default_rng(item_random(self.seed, item, "corruption").getrandbits(64))
        noise = draws.integers(0, self.shards.index.codebook_size, size=tokens.shape)
        return numpy.where(draws.random(tokens.shape) < self.token_corruption, noise, tokens)


class TokenBatch(NamedTuple):
    """text ids [B, T] (or features) and mask; image_tokens [B, N] int64, to be predicted; input_tokens [B, N] int64, to be fed;
    layout [B, L] int64 of data that has one."""

    text: TextBatch
    image_tokens: Tensor
    input_tokens: Tensor
    layout: Tensor | None = None


class Captions(Protocol):
    """What turns captions into a model's text input."""

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> a TextBatch."""


class CollateTokens:
    """Stack visits into a TokenBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: Captions) -> None:
        self.text_source = text_source

    def __call__(self, items: Sequence[TokenItem]) -> TokenBatch:
        targets, inputs = (torch.from_numpy(numpy.stack(rows).astype(numpy.int64)) for rows in (
            [item.image_tokens for item in items], [item.input_tokens for item in items]))
        layouts = [item.layout for item in items if item.layout is not None]
        layout = torch.from_numpy(numpy.stack(layouts).astype(numpy.int64)) if layouts else None
        return TokenBatch(self.text_source.encode([item.caption for item in items]), targets, inputs, layout)
