"""Captioned pictures in place of token shards: encoded when they are read, by the image tokenizer, on its device."""

# Axes: B batch, S side in pixels, N image tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from seq2seq import TextBatch
from tokenizer_image import ImageTokenizer
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import pixels_to_float
from training.data.sources.captioned_images import CaptionedImages
from training.data.tokens.shards import TokenIndex
from training.data.visits.images import Dropped, ImageVisits
from training.data.visits.order import ItemId, uniform, visit_bits
from training.data.visits.tokens import Captions, TokenBatch, corrupted, without_dropped


class PictureTokens:
    """Pictures as a transformer's training asks for them: `index`, `captions(i)`, `all_captions()`, `key(i)`."""

    def __init__(self, source: CaptionedImages, tokenizer: ImageTokenizer, fingerprint: str) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.index = TokenIndex(tokenizer_fingerprint=fingerprint, codebook_size=tokenizer.codebook_size, grid=tokenizer.grid,
                                splits={})
        self.captions, self.all_captions, self.key = source.captions, source.all_captions, source.key

    def __len__(self) -> int:
        return len(self.source)


class PictureBatch(NamedTuple):
    """image [B, 3, S, S] in [-1, 1]; text ids [B, T] (or features) and mask; the visits; unusable items met on the way."""

    image: Tensor
    text: TextBatch
    items: list[ItemId]
    dropped: list[Dropped]


class PictureRows(NamedTuple):
    """Visits of pictures: pixels [B, S, S, 3] uint8, captions ('' = the null caption), the visits, unusable items."""

    pixels: numpy.ndarray
    captions: list[str]
    items: list[ItemId]
    dropped: list[Dropped]


class PictureTokenVisits(torch.utils.data.Dataset):
    """Pictures by ItemId with one of their captions, drawn as TokenVisits draws it from token shards."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int, horizontal_flip: float, caption_dropout: float,
                 first_caption: bool = False) -> None:
        self.source, self.seed = source, seed
        self.caption_dropout, self.first_caption = caption_dropout, first_caption
        self.pictures = ImageVisits(source, resolution, seed, horizontal_flip)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> PictureRows:
        """One visit, as a batch of one."""
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[ItemId]) -> PictureRows:
        """Visits of a whole batch, which torch's loaders ask for."""
        choice = uniform(visit_bits(self.seed, items, "caption"))
        pictures, captions = [], []
        for item, draw in zip(items, choice, strict=True):
            pictures.append(picture := self.pictures[item])
            # each one passed over is one further
            given = self.source.captions((item.index + len(picture.dropped)) % len(self.source))
            captions.append(given[0] if self.first_caption else given[int(draw * len(given))])
        return PictureRows(numpy.stack([picture.pixels for picture in pictures]),
                           without_dropped(captions, self.seed, items, self.caption_dropout), list(items),
                           [one for picture in pictures for one in picture.dropped])


class CollatePictures:
    """Visits as a PictureBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: Captions) -> None:
        self.text_source = text_source

    def __call__(self, rows: PictureRows) -> PictureBatch:
        return PictureBatch(pixels_to_float(rows.pixels), self.text_source.encode(rows.captions), rows.items, rows.dropped)


@torch.no_grad()
def with_tokens(batch: PictureBatch, tokenizer: ImageTokenizer, seed: int, token_corruption: float) -> TokenBatch:
    """Encode a batch's pictures on the tokenizer's device, in its precision; corrupted as TokenVisits corrupts."""
    codes = tokenizer.encode(batch.image.to(next(tokenizer.parameters()).device))  # [B, h, w]
    tokens = codes_to_tokens(codes)
    inputs = tokens
    if token_corruption:
        noisy = corrupted(tokens.cpu().numpy(), seed, batch.items, token_corruption, tokenizer.codebook_size)
        inputs = torch.from_numpy(noisy).to(tokens.device)
    return TokenBatch(batch.text, tokens, inputs)
