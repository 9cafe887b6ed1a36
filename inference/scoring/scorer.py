"""What can say how well captions fit pictures, whoever trained it, and the choice of the best of several candidates."""

# Axes: P pictures, M captions, E width of the space that both share

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tokenloom_common.errors import UserError


class Scorer(Protocol):
    """What reranking needs."""

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """P pictures, M captions -> [P, M]: larger fits better."""


class ImageTextScorer:
    """Pictures and captions in one space. A subclass gives `_embed_images` and `_embed_captions`, a batch at a time."""

    batch_size = 64

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """P pictures of any size (the centre square counts) -> [P, E] float32 of length 1, on the CPU. UserError for others."""
        return self._in_batches(_checked(images, Image.Image, "picture", "a PIL image"), self._embed_images)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """M captions -> [M, E] float32 of length 1, on the CPU. UserError for what is not a list of text."""
        return self._in_batches(_checked(captions, str, "caption", "text"), self._embed_captions)

    def scores(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """P pictures, M captions -> cosine similarity [P, M] float32 in [-1, 1], on the CPU."""
        return self.embed_images(images) @ self.embed_captions(captions).T

    @torch.inference_mode()
    def _in_batches(self, items: list[Any], embed: Any) -> Tensor:
        parts = [embed(items[start: start + self.batch_size]) for start in range(0, len(items), self.batch_size)]
        return torch.cat(parts).float().cpu().clone()

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        raise NotImplementedError

    def _embed_captions(self, captions: list[str]) -> Tensor:
        raise NotImplementedError


def _checked(items: Sequence[Any], wanted: type, what: str, words: str) -> list[Any]:
    if isinstance(items, (str, bytes, Image.Image)) or not isinstance(items, Sequence):
        raise UserError(f"give a list of {what}s, got {type(items).__name__}")
    for row, item in enumerate(items):
        if not isinstance(item, wanted):
            raise UserError(f"{what} {row} is {type(item).__name__}, expected {words}")
    if not items:
        raise UserError(f"no {what} given")
    return list(items)
