"""Retrieval accuracy: does a scorer, ours or a published one, find an image's caption?"""

# Axes: P images with one caption each, C captions to choose from

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

MOST_CAPTIONS = 500  # more make the task harder: compare only between equally many
TOP = (1, 5)
IMAGES_AT_ONCE = 64


class Pair(NamedTuple):
    """A row of the data, and the caption that its image is to be found by."""

    row: int
    caption: str


def choose_pairs(source: CaptionedImages, seed: int, most: int = MOST_CAPTIONS) -> list[Pair]:
    """Choose up to `most` rows at random, each with one of its captions.

    No caption comes twice, whatever its case: an image would then have two right answers.
    """
    # seeded with text: the same on every machine, and unlike what other uses of the seed draw
    order = list(range(len(source)))
    random.Random(f"{seed} retrieval").shuffle(order)
    pairs: dict[str, Pair] = {}
    for row in order:
        caption = item_random(seed, ItemId(0, row), "retrieval").choice(source.captions(row))
        pairs.setdefault(caption.casefold(), Pair(row, caption))  # the first row of a caption stays
        if len(pairs) == most:
            break
    return list(pairs.values())


def ranks(scores: Tensor, right: Tensor | None = None) -> Tensor:
    """Count the wrong captions that score at least as much as the right one: scores [P, C] -> [P].

    right [P] int64: column of each image's own caption; default: column i for image i. A tie
    counts against the scorer, since one that scores everything alike has found nothing.
    RunFailedError for a score that is not finite.
    """
    if not bool(scores.isfinite().all()):
        raise RunFailedError("a score of picture and caption is not finite; the matcher or its "
                             "weights are broken")
    columns = torch.arange(len(scores)) if right is None else right
    own = scores.gather(1, columns[:, None])  # [P, 1]
    at_least = (scores >= own).sum(dim=1)
    return at_least - 1  # the right caption itself is among them


def retrieval_accuracy(scores: Tensor, right: Tensor | None = None) -> dict[str, float]:
    """Share of images whose caption is the best, or among the best five; arguments as in `ranks`.

    chance_top1, chance_top5: what guessing would reach.
    """
    rank = ranks(scores, right)
    captions = scores.shape[1]
    shares = {f"top{top}": float((rank < top).double().mean()) for top in TOP}
    chances = {f"chance_top{top}": min(top, captions) / captions for top in TOP}
    return shares | chances


def evaluate_retrieval(scorer: ImageTextScorer, source: CaptionedImages, seed: int = 0,
                       most: int = MOST_CAPTIONS) -> dict[str, Any]:
    """Find each image's caption among up to `most` different ones of the split.

    Images that cannot be read are left out and counted. DataError if none is usable.
    """
    unusable: Counter[str] = Counter()
    usable: list[Pair] = []
    embeddings: list[Tensor] = []
    pairs = choose_pairs(source, seed, most)
    for start in range(0, len(pairs), IMAGES_AT_ONCE):  # large images would not all fit in memory
        images = []
        for pair in pairs[start: start + IMAGES_AT_ONCE]:
            try:
                images.append(source[pair.row].image)
                usable.append(pair)
            except BAD_ITEM_ERRORS as error:
                unusable[error.reason] += 1
        if images:
            embeddings.append(scorer.embed_images(images))
    if not usable:
        raise DataError("no usable picture to measure retrieval on")

    texts = scorer.embed_captions([pair.caption for pair in usable])
    scores = torch.cat(embeddings) @ texts.T  # cosines [P, C]: all embeddings have length 1
    return {"captions": len(usable), **retrieval_accuracy(scores), "unusable": unusable.total(),
            "seed": seed}
