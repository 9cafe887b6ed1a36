"""Does a sampled picture show what its caption says? Nearest-neighbour check against the training pictures.

Feature space: the picture averaged down to 16 x 16 RGB, mean squared distance. A sample counts as right when the nearest
training picture has the caption's own base caption. Simple, fixed, and it needs no other network.
"""

# Axes: B pictures, M training pictures, F features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference import TextToImage
from tokenizer_image.images import image_to_pixels
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.data.sources.captioned_images import CaptionedImages

FEATURE_SIDE = 16
FEATURE_SPACE = "mean squared distance on a 16x16 RGB downscale"


class Question(NamedTuple):
    """A caption to sample, and the base caption that its picture should be nearest to."""

    caption: str
    base_caption: str


def picture_features(images: Sequence[Image.Image]) -> Tensor:
    """Pictures -> [B, 16*16*3] float32 in [0, 1], by area averaging."""
    small = [numpy.asarray(image.convert("RGB").resize((FEATURE_SIDE, FEATURE_SIDE), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(numpy.stack(small)).float().flatten(1) / 255


def nearest(features: Tensor, reference: Tensor) -> Tensor:
    """Index [B] of the row of reference [M, F] with the smallest mean squared distance to each row of features [B, F]."""
    return torch.cdist(features, reference, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


class TrainingPictures:
    """Features and base captions of a training split."""

    def __init__(self, source: CaptionedImages, resolution: int) -> None:
        """DataError if the rows have no base caption (column `caption`)."""
        images, self.base_captions = [], []
        for row in range(len(source)):
            self.base_captions.append(_base_caption(source.metadata(row), row))
            images.append(Image.fromarray(image_to_pixels(source[row].image, resolution)))
        self.features = picture_features(images)

    def score(self, images: Sequence[Image.Image], questions: Sequence[Question]) -> dict[str, Any]:
        """Share of pictures whose nearest training picture has the question's base caption, and what it was measured on."""
        hits = [self.base_captions[int(i)] for i in nearest(picture_features(images), self.features)]
        right = sum(hit == question.base_caption for hit, question in zip(hits, questions, strict=True))
        bases = len(set(self.base_captions))
        return {"accuracy": right / len(images), "captions": len(images), "chance": 1 / bases, "base_captions": bases,
                "training_pictures": len(self.base_captions), "feature_space": FEATURE_SPACE}


def _base_caption(values: dict[str, Any], row: int) -> str:
    if not values.get("caption"):
        raise DataError(f"row {row} has no `caption` column with its base caption; caption accuracy needs one")
    return str(values["caption"])


def choose_questions(source: CaptionedImages, count: int, seed: int) -> list[Question]:
    """`count` captions of different base captions where there are enough, each naming base and style where there is one.

    DataError if the rows have no base caption (column `caption`).
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    first: list[Question] = []
    again: list[Question] = []
    seen: set[str] = set()
    for row in order:
        values = source.metadata(row)
        base = _base_caption(values, row)
        style = values.get("style")
        caption = next((c for c in source.captions(row) if style and c.startswith(base) and "style" in c), base)
        (again if base in seen else first).append(Question(caption, base))
        seen.add(base)
    return (first + again)[:count]


def sample_questions(model: TextToImage, questions: Sequence[Question], seed: int, what: str,
                     batch_size: int = 20) -> list[Image.Image]:
    """One picture a question, with the model folder's own sampling defaults."""
    images: list[Image.Image] = []
    with progress(None, what, total=len(questions), unit="picture") as bar:
        for start in range(0, len(questions), batch_size):
            some = questions[start: start + batch_size]
            images += model.generate([q.caption for q in some], seed=seed + start).images
            bar.update(len(some))
    return images
