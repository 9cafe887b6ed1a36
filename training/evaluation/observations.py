"""Embeddings, features and scenes of the images in the evaluation of a generator."""

# Axes: P images, B batch, S pixels on a side, E width of the matcher's space, F features

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from training.evaluation.caption_accuracy import picture_features
from training.evaluation.image_metrics.pixel_metrics import Moments
from training.evaluation.scenes.reader import Seen, read_scene
from training.evaluation.scorers import Scorers

SHOWN_IMAGES = 16  # of the contact sheet: two rows of it


class Observations:
    """Everything that the scorers see in images that arrive in batches.

    Only the first SHOWN_IMAGES images are kept themselves, so that memory does not grow with the
    sample by whole images.
    """

    def __init__(self, scorers: Scorers) -> None:
        self._scorers = scorers
        self.shown: list[Image.Image] = []
        self.scenes: list[list[Seen]] = []
        dimensions = scorers.extractor.dimensions if scorers.extractor else 0
        self.moments = Moments(dimensions)
        self._embeddings: list[Tensor] = []
        self._features: list[Tensor] = []
        self._small: list[Tensor] = []

    def add(self, pixels: Tensor) -> None:
        """Observe pixels uint8 [B, S, S, 3]."""
        scorers = self._scorers
        arrays = [image.numpy() for image in pixels]
        images = [Image.fromarray(array) for array in arrays]
        self.shown += images[: SHOWN_IMAGES - len(self.shown)]  # [:0] once there are enough

        if scorers.matcher is not None:
            self._embeddings.append(scorers.matcher.embed_images(images))
        if scorers.extractor is not None:
            features = scorers.extractor(pixels)
            self.moments.update(features)
            self._features.append(features)  # the moments are not enough for nearest neighbours
        if scorers.training is not None:
            self._small.append(picture_features(images))
        if scorers.reads_scenes:
            self.scenes += [read_scene(array) for array in arrays]

    @property
    def embeddings(self) -> Tensor:
        """The matcher's embeddings [P, E] float32, of length 1."""
        return torch.cat(self._embeddings)

    @property
    def small_images(self) -> Tensor:
        """The images averaged down, as `caption_accuracy.picture_features` [P, 768] does."""
        return torch.cat(self._small)

    @property
    def directions(self) -> Tensor:
        """Features [P, F] scaled to length 1."""
        return torch.nn.functional.normalize(torch.cat(self._features), dim=1)
