"""Does a scorer find the caption of a picture among many? Works with a matcher of ours and with published models alike."""

# Axes: P pictures with one caption each, C captions to choose from, E width of the space that both share

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.scoring.scorer import ImageTextScorer
from tokenloom_common.errors import DataError, RunFailedError
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.visits.order import ItemId, item_random

MOST_CAPTIONS = 500
TOP = (1, 5)
PICTURES_AT_ONCE = 64


class Pair(NamedTuple):
    """A row of the data and the caption that its picture is to be found by."""

    row: int
    caption: str


def choose_pairs(source: CaptionedImages, seed: int, most: int = MOST_CAPTIONS) -> list[Pair]:
    """Up to `most` rows in an order that the seed decides, each with one of its captions, no caption twice in any case."""
    order = list(range(len(source)))
    random.Random(f"{seed} retrieval").shuffle(order)
    pairs: dict[str, Pair] = {}
    for row in order:
        caption = item_random(seed, ItemId(0, row), "retrieval").choice(source.captions(row))
        pairs.setdefault(caption.casefold(), Pair(row, caption))
        if len(pairs) == most:
            break
    return list(pairs.values())


def ranks(scores: Tensor, right: Tensor | None = None) -> Tensor:
    """scores [P, C] -> [P] int64: how many wrong captions score at least as much as the right one of picture i, in column
    right[i] (default: column i). RunFailedError for a score that is not finite.

    A tie counts against the scorer: one that scores everything alike has found nothing.
    """
    if not bool(scores.isfinite().all()):
        raise RunFailedError("a score of picture and caption is not finite; the matcher or its weights are broken")
    columns = torch.arange(len(scores)) if right is None else right
    return (scores >= scores.gather(1, columns[:, None])).sum(dim=1) - 1


def retrieval_accuracy(scores: Tensor, right: Tensor | None = None) -> dict[str, float]:
    """Share of pictures whose caption is the best, and among the best five, with what guessing would reach: see `ranks`."""
    found, count = ranks(scores, right), scores.shape[1]
    return {**{f"top{top}": float((found < top).double().mean()) for top in TOP},
            **{f"chance_top{top}": min(top, count) / count for top in TOP}}


def evaluate_retrieval(scorer: ImageTextScorer, source: CaptionedImages, seed: int = 0,
                       most: int = MOST_CAPTIONS) -> dict[str, Any]:
    """Picture -> its caption among `captions` different ones of the split. Unusable pictures are left out and counted."""
    unusable: Counter[str] = Counter()
    usable: list[Pair] = []
    parts: list[Tensor] = []
    pairs = choose_pairs(source, seed, most)
    for start in range(0, len(pairs), PICTURES_AT_ONCE):  # large pictures would not all fit into memory
        images = []
        for pair in pairs[start: start + PICTURES_AT_ONCE]:
            try:
                images.append(source[pair.row].image)
                usable.append(pair)
            except BAD_ITEM_ERRORS as error:
                unusable[error.reason] += 1
        if images:
            parts.append(scorer.embed_images(images))
    if not usable:
        raise DataError("no usable picture to measure retrieval on")
    scores = torch.cat(parts) @ scorer.embed_captions([pair.caption for pair in usable]).T
    return {"captions": len(usable), **retrieval_accuracy(scores), "unusable": unusable.total(), "seed": seed}
