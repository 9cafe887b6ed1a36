"""Visits of captioned images that are tokenized during the run, in place of token shards."""

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
from training.data.sources.drops import BadItem
from training.data.tokens.shards import TokenIndex
from training.data.visits.images import ImageVisits
from training.data.visits.order import ItemId, uniform, visit_bits
from training.data.visits.tokens import CaptionEncoder, TokenBatch, corrupt_tokens, drop_captions


class OnTheFlyTokens:
    """Captioned images with the interface of TokenShards, but without tokens."""

    def __init__(self, source: CaptionedImages, tokenizer: ImageTokenizer,
                 fingerprint: str) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.index = TokenIndex(tokenizer_fingerprint=fingerprint, grid=tokenizer.grid,
                                codebook_size=tokenizer.codebook_size, splits={})
        self.captions = source.captions
        self.all_captions = source.all_captions
        self.key = source.key

    def __len__(self) -> int:
        return len(self.source)


class OnTheFlyRows(NamedTuple):
    """Visits of images, before the captions are encoded."""

    pixels: numpy.ndarray  # [B, S, S, 3] uint8
    captions: list[str]  # '' is the null caption
    items: list[ItemId]
    dropped: list[BadItem]


class OnTheFlyBatch(NamedTuple):
    """Images that `tokenize_batch` makes a TokenBatch of."""

    image: Tensor  # [B, 3, S, S] in [-1, 1]
    text: TextBatch
    items: list[ItemId]
    dropped: list[BadItem]


class OnTheFlyVisits(torch.utils.data.Dataset):
    """Images by ItemId with one of their captions, drawn as by TokenVisits."""

    def __init__(self, source: CaptionedImages, resolution: int, seed: int, horizontal_flip: float,
                 caption_dropout: float, first_caption: bool = False) -> None:
        self.source = source
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.first_caption = first_caption
        self.images = ImageVisits(source, resolution, seed, horizontal_flip)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: ItemId) -> OnTheFlyRows:
        """Return one visit, as a batch of one."""
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[ItemId]) -> OnTheFlyRows:
        """Return the visits of a whole batch, which torch's loaders ask for."""
        # the purpose "caption" as in TokenVisits: the same captions as with token shards
        draws = uniform(visit_bits(self.seed, items, "caption"))
        pixels = []
        captions = []
        dropped: list[BadItem] = []
        for item, draw in zip(items, draws, strict=True):
            image = self.images[item]
            pixels.append(image.pixels)
            dropped += image.dropped
            choices = self.source.captions(image.index)  # of the row that replaced an unusable one
            chosen = 0 if self.first_caption else int(draw * len(choices))
            captions.append(choices[chosen])

        captions = drop_captions(captions, self.seed, items, self.caption_dropout)
        return OnTheFlyRows(numpy.stack(pixels), captions, list(items), dropped)


class CollateOnTheFly:
    """Turn OnTheFlyRows into an OnTheFlyBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: CaptionEncoder) -> None:
        self.text_source = text_source

    def __call__(self, rows: OnTheFlyRows) -> OnTheFlyBatch:
        image = pixels_to_float(rows.pixels)
        text = self.text_source.encode(rows.captions)
        return OnTheFlyBatch(image, text, rows.items, rows.dropped)


@torch.no_grad()
def tokenize_batch(batch: OnTheFlyBatch, tokenizer: ImageTokenizer, seed: int,
                   token_corruption: float) -> TokenBatch:
    """Encode a batch's images on the tokenizer's device and corrupt tokens as TokenVisits does."""
    device = next(tokenizer.parameters()).device
    codes = tokenizer.encode(batch.image.to(device))  # [B, h, w]
    tokens = codes_to_tokens(codes)
    inputs = tokens
    if token_corruption:
        # in numpy on the CPU: the random codes must be those that token shards would get
        corrupted = corrupt_tokens(tokens.cpu().numpy(), seed, batch.items, token_corruption,
                                   tokenizer.codebook_size)
        inputs = torch.from_numpy(corrupted).to(tokens.device)
    return TokenBatch(batch.text, tokens, inputs)
