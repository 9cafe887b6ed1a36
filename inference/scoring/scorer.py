"""Scorers: how well captions fit images, whoever trained the model."""

# Axes: P images, M captions, E width of the shared space

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tokenloom_common.errors import UserError


class Scorer(Protocol):
    """Anything that scores images against captions; reranking needs no more."""

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Score P images against M captions -> [P, M], where larger fits better."""


class ImageTextScorer:
    """Embeds images and captions in one space.

    A subclass implements _embed_images and _embed_captions, for a batch.
    """

    batch_size = 64

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed P images of any size -> [P, E] float32 of length 1, on the CPU.

        Their centre squares count. UserError for anything but a list of PIL images.
        """
        checked = _checked(images, Image.Image, "picture", "a PIL image")
        return self._in_batches(checked, self._embed_images)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed M captions -> [M, E] float32 of length 1, on the CPU.

        UserError for anything but a list of text.
        """
        checked = _checked(captions, str, "caption", "text")
        return self._in_batches(checked, self._embed_captions)

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Return cosine similarities [P, M] float32 in [-1, 1], on the CPU."""
        return self.embed_images(images) @ self.embed_captions(captions).T

    @torch.inference_mode()
    def _in_batches(self, items: list[Any], embed: Any) -> Tensor:
        parts = []
        for start in range(0, len(items), self.batch_size):
            parts.append(embed(items[start: start + self.batch_size]))
        return torch.cat(parts).float().cpu()

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        raise NotImplementedError

    def _embed_captions(self, captions: list[str]) -> Tensor:
        raise NotImplementedError


def _checked(items: Sequence[Any], wanted: type, what: str, words: str) -> list[Any]:
    """Return items as a list. UserError, naming the row, unless it is a list of `wanted`."""
    # a str is a sequence too: a single caption would be scored letter by letter
    if isinstance(items, (str, bytes, Image.Image)) or not isinstance(items, Sequence):
        raise UserError(f"give a list of {what}s, got {type(items).__name__}")
    for row, item in enumerate(items):
        if not isinstance(item, wanted):
            raise UserError(f"{what} {row} is {type(item).__name__}, expected {words}")
    if not items:
        raise UserError(f"no {what} given")
    return list(items)
