"""Visits of token shards, for training transformers."""

# Axes: B batch, N image tokens, L layout tokens, T text ids

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from seq2seq import TextBatch
from training.data.tokens.shards import TokenShards
from training.data.visits.order import (
    GOLDEN_GAMMA,
    ItemId,
    ItemIds,
    splitmix64,
    uniform,
    visit_bits,
)

LOWER_HALF = numpy.uint64((1 << 32) - 1)
HALF_BITS = numpy.uint64(32)


class TokenRows(NamedTuple):
    """Visits of encoded images, before the captions are encoded."""

    captions: list[str]  # '' is the null caption
    image_tokens: numpy.ndarray  # [B, N], to be predicted
    input_tokens: numpy.ndarray  # [B, N], fed to the decoder
    layout: numpy.ndarray | None = None  # [B, L]


class TokenVisits(torch.utils.data.Dataset):
    """Encoded images by ItemId, with one of their captions and one of the views of the shards.

    The caption is dropped to the null caption with probability `caption_dropout`. A share of
    `token_corruption` of the tokens fed to the decoder are random codes (taming-transformers'
    1 - pkeep, Esser et al. 2021): a model that must not trust every token before it keeps listening
    to the caption when it samples.
    """

    def __init__(self, shards: TokenShards, seed: int, caption_dropout: float,
                 token_corruption: float = 0.0, first_caption: bool = False,
                 use_layout: bool = True, first_view: bool = False) -> None:
        """first_caption: take each row's first caption, the class in class-conditional models.
        first_view: take the plain image."""
        self.shards = shards
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.token_corruption = token_corruption
        self.first_caption = first_caption
        self.first_view = first_view

        has_layout = use_layout and shards.index.layout is not None
        self._names = ("tokens", "layout") if has_layout else ("tokens",)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: ItemId) -> TokenRows:
        """Return one visit, as a batch of one."""
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[ItemId]) -> TokenRows:
        """Return the visits of a whole batch, which torch's loaders ask for."""
        items = ItemIds.from_sequence(items)
        index = self.shards.index

        views = numpy.zeros(len(items), dtype=numpy.int64)
        if not self.first_view and len(index.views) > 1:
            draws = uniform(visit_bits(self.seed, items, "view"))
            views = (draws * len(index.views)).astype(numpy.int64)
        choice = None
        if not self.first_caption:
            choice = uniform(visit_bits(self.seed, items, "caption"))
        captions, columns = self.shards.gather(items.indices, views, choice, self._names)

        captions = drop_captions(captions, self.seed, items, self.caption_dropout)
        tokens = columns["tokens"]
        inputs = corrupt_tokens(tokens, self.seed, items, self.token_corruption,
                                index.codebook_size)
        return TokenRows(captions, tokens, inputs, columns.get("layout"))


def drop_captions(captions: list[str], seed: int, items: Sequence[ItemId],
                  probability: float) -> list[str]:
    """Replace each visit's caption by the null caption with that probability."""
    if not probability:
        return captions
    dropped = (uniform(visit_bits(seed, items, "dropout")) < probability).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def corrupt_tokens(tokens: numpy.ndarray, seed: int, items: Sequence[ItemId], share: float,
                   codebook_size: int) -> numpy.ndarray:
    """Replace that share of the visits' tokens [B, N] by random codes; 0 returns the same array."""
    if not share:
        return tokens
    visits = visit_bits(seed, items, "corruption")
    positions = numpy.arange(tokens.shape[1], dtype=numpy.uint64) * GOLDEN_GAMMA
    bits = splitmix64(visits[:, None] + positions)  # [B, N]

    # the upper half decides whether a token is replaced, the lower half by which code
    replaced = bits >> HALF_BITS < numpy.uint64(share * 2.0**32)
    codes = (bits & LOWER_HALF) * numpy.uint64(codebook_size) >> HALF_BITS
    return numpy.where(replaced, codes.astype(tokens.dtype), tokens)


class TokenBatch(NamedTuple):
    """A transformer's batch."""

    text: TextBatch
    image_tokens: Tensor  # [B, N] int64, to be predicted
    input_tokens: Tensor  # [B, N] int64, fed to the decoder
    layout: Tensor | None = None  # [B, L] int64


class CaptionEncoder(Protocol):
    """Encoder of captions into a model's text input."""

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> a TextBatch."""


class CollateTokens:
    """Turn TokenRows into a TokenBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: CaptionEncoder) -> None:
        self.text_source = text_source

    def __call__(self, rows: TokenRows) -> TokenBatch:
        text = self.text_source.encode(rows.captions)
        targets = _as_int64(rows.image_tokens)
        inputs = _as_int64(rows.input_tokens)
        layout = None if rows.layout is None else _as_int64(rows.layout)
        return TokenBatch(text, targets, inputs, layout)


def _as_int64(tokens: numpy.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(numpy.int64))
