"""Caption accuracy: does a sampled image look like a training image of its caption?

A sample is right if the nearest training image has the base caption that was asked for. Distance:
mean squared difference after averaging down to 16 x 16 RGB. Simple, fixed, and no network needed.
"""

# Axes: B images, M training images, F features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference import TextToImage
from tokenizer_image.images import BadImageError, image_to_pixels
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.data.sources.captioned_images import CaptionedImages

FEATURE_SIDE = 16
# stands in the report: an accuracy can be compared only within one feature space
FEATURE_SPACE = "mean squared distance on a 16x16 RGB downscale"


class Question(NamedTuple):
    """A caption to sample, and the base caption that its image should be nearest to."""

    caption: str
    base_caption: str


def picture_features(images: Sequence[Image.Image]) -> Tensor:
    """Average images down to features [B, 16*16*3] float32 in [0, 1]."""
    small = []
    for image in images:
        rgb = image.convert("RGB")
        # BOX is a plain mean of the pixels that fall into each cell
        small.append(numpy.asarray(rgb.resize((FEATURE_SIDE, FEATURE_SIDE), Image.Resampling.BOX)))
    return torch.from_numpy(numpy.stack(small)).float().flatten(1) / 255


def nearest(features: Tensor, reference: Tensor) -> Tensor:
    """Index [B] of the nearest row of reference [M, F] to each row of features [B, F]."""
    # not by matrix products, which lose the small distances between near-equal rows to rounding
    distances = torch.cdist(features, reference, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(dim=1)


class TrainingPictures:
    """Features and base captions of a training split."""

    def __init__(self, source: CaptionedImages, resolution: int,
                 is_base_first: bool = False) -> None:
        """is_base_first: a row's base caption is its first one, instead of its column `caption`.

        DataError if the rows have no base caption.
        """
        self.base_captions: list[str] = []
        self.unusable = 0
        images = []
        for row in range(len(source)):
            try:
                pixels = image_to_pixels(source[row].image, resolution)
            except BadImageError:  # training leaves it out too
                self.unusable += 1
                continue
            # at the model's resolution first, so that both sides lose the same detail
            images.append(Image.fromarray(pixels))
            if is_base_first:
                base = source.captions(row)[0]
            else:
                base = _base_caption(source.metadata(row), row)
            self.base_captions.append(base)
        if not images:
            raise DataError(f"none of {self.unusable} training pictures can be read")
        self.features = picture_features(images)

    def score(self, images: Sequence[Image.Image], questions: Sequence[Question]) -> dict[str, Any]:
        """Share of images whose nearest training image has the question's base caption."""
        base_captions = [question.base_caption for question in questions]
        return self.score_features(picture_features(images), base_captions)

    def score_features(self, features: Tensor, base_captions: Sequence[str]) -> dict[str, Any]:
        """Do what `score` does for features [B, F] of images that should have `base_captions`."""
        right = 0
        hits = nearest(features, self.features).tolist()
        for hit, base_caption in zip(hits, base_captions, strict=True):
            right += self.base_captions[hit] == base_caption
        distinct = len(set(self.base_captions))  # several rows may draw the same thing in styles
        return {"accuracy": right / len(hits), "captions": len(hits), "chance": 1 / distinct,
                "base_captions": distinct, "training_pictures": len(self.base_captions),
                "unusable_training_pictures": self.unusable, "feature_space": FEATURE_SPACE}


def _base_caption(values: dict[str, Any], row: int) -> str:
    if not values.get("caption"):
        raise DataError(f"row {row} has no `caption` column with its base caption; caption "
                        "accuracy needs one")
    return str(values["caption"])


def choose_questions(source: CaptionedImages, count: int, seed: int) -> list[Question]:
    """Draw `count` captions, of different base captions as far as there are enough.

    Each names base and style where the row has a style. DataError if the rows have no base
    caption (column `caption`).
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    new_bases: list[Question] = []
    repeated_bases: list[Question] = []  # used only when there are too few of the others
    seen: set[str] = set()
    for row in order:
        values = source.metadata(row)
        base = _base_caption(values, row)
        caption = base
        if values.get("style"):
            caption = _styled_caption(source.captions(row), base)
        questions = repeated_bases if base in seen else new_bases
        questions.append(Question(caption, base))
        seen.add(base)
    return (new_bases + repeated_bases)[:count]


def _styled_caption(captions: Sequence[str], base: str) -> str:
    """Return the first caption that adds a style to the base; the base itself if none does."""
    for caption in captions:
        if caption.startswith(base) and "style" in caption:
            return caption
    return base


def sample_questions(model: TextToImage, questions: Sequence[Question], seed: int, what: str,
                     batch_size: int = 20) -> list[Image.Image]:
    """Sample one image per question, with the model folder's own sampling defaults."""
    images: list[Image.Image] = []
    with progress(None, what, total=len(questions), unit="picture") as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start: start + batch_size]
            captions = [question.caption for question in batch]
            images += model.generate(captions, seed=seed + start).images
            bar.update(len(batch))
    return images
