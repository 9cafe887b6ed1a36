"""Data sets as training reads them: one visit of one item, with its own random numbers.

Axes: B batch, S side in pixels, N image tokens, L layout tokens, T text ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from seq2seq import TextBatch
from training.data.tokens.shards import TokenShards
from training.data.visits.order import STEP, ItemId, Items, mix, uniform, visit_bits

HALF = numpy.uint64((1 << 32) - 1)


class TokenRows(NamedTuple):
    """Visits of encoded pictures: captions ('' = the null caption), tokens [B, N], what the decoder is fed [B, N], and layouts
    [B, L], if any."""

    captions: list[str]
    image_tokens: numpy.ndarray
    input_tokens: numpy.ndarray
    layout: numpy.ndarray | None = None


class TokenVisits(torch.utils.data.Dataset):
    """Encoded pictures by ItemId: one of the captions, dropped to the null caption with a chance of `caption_dropout`, and one
    of the views that the shards have.

    A share of `token_corruption` of the tokens that the decoder is fed are random codes (taming-transformers' 1 - pkeep,
    Esser et al. 2021): a model that must not trust every token before it keeps listening to the caption when it samples.
    """

    def __init__(self, shards: TokenShards, seed: int, caption_dropout: float, token_corruption: float = 0.0,
                 first_caption: bool = False, use_layout: bool = True, first_view: bool = False) -> None:
        """first_caption: always a row's first one, which is its class for class-conditional models; first_view: the picture
        as it is."""
        self.shards, self.seed, self.first_caption, self.first_view = shards, seed, first_caption, first_view
        self.caption_dropout, self.token_corruption = caption_dropout, token_corruption
        self._names = ("tokens", "layout") if use_layout and shards.index.layout is not None else ("tokens",)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: ItemId) -> TokenRows:
        """One visit, as a batch of one."""
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[ItemId]) -> TokenRows:
        """Visits of a whole batch, which torch's loaders ask for."""
        items = Items.of(items)
        views = numpy.zeros(len(items), dtype=numpy.int64)
        if not self.first_view and len(self.shards.index.views) > 1:
            views = (uniform(visit_bits(self.seed, items, "view")) * len(self.shards.index.views)).astype(numpy.int64)
        choice = None if self.first_caption else uniform(visit_bits(self.seed, items, "caption"))
        captions, columns = self.shards.gather(items.indices, views, choice, self._names)
        captions = without_dropped(captions, self.seed, items, self.caption_dropout)
        tokens = columns["tokens"]
        inputs = corrupted(tokens, self.seed, items, self.token_corruption, self.shards.index.codebook_size)
        return TokenRows(captions, tokens, inputs, columns.get("layout"))


def without_dropped(captions: list[str], seed: int, items: Sequence[ItemId], chance: float) -> list[str]:
    """Captions of visits, each dropped to the null caption with that chance."""
    if not chance:
        return captions
    dropped = (uniform(visit_bits(seed, items, "dropout")) < chance).tolist()
    return ["" if gone else caption for caption, gone in zip(captions, dropped, strict=True)]


def corrupted(tokens: numpy.ndarray, seed: int, items: Sequence[ItemId], share: float, codebook_size: int) -> numpy.ndarray:
    """Tokens [B, N] of visits with that share of them replaced by random codes; the same array where the share is 0."""
    if not share:
        return tokens
    places = numpy.arange(tokens.shape[1], dtype=numpy.uint64) * STEP
    bits = mix(visit_bits(seed, items, "corruption")[:, None] + places)  # [B, N]: the upper half says whether, the lower what
    code = (bits & HALF) * numpy.uint64(codebook_size) >> numpy.uint64(32)
    return numpy.where(bits >> numpy.uint64(32) < numpy.uint64(share * 2.0**32), code.astype(tokens.dtype), tokens)


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
    """Visits as a TokenBatch (a class, so that loader workers can receive it)."""

    def __init__(self, text_source: Captions) -> None:
        self.text_source = text_source

    def __call__(self, rows: TokenRows) -> TokenBatch:
        layout = None if rows.layout is None else torch.from_numpy(rows.layout.astype(numpy.int64))
        targets = torch.from_numpy(rows.image_tokens.astype(numpy.int64))
        inputs = torch.from_numpy(rows.input_tokens.astype(numpy.int64))
        return TokenBatch(self.text_source.encode(rows.captions), targets, inputs, layout)
