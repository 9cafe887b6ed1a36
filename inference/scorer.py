"""What can say how well captions fit pictures, whoever trained it, and the choice of the best of several candidates."""

# Axes: P pictures, M captions, E width of the space that both share

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tokenloom_common.errors import UserError

if TYPE_CHECKING:
    from inference.results import GenerationResult


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


def check_candidates(rerank_from: int | None, num_images: int) -> None:
    """UserError when there are fewer candidates than pictures to keep. None: there is no choice to make."""
    if rerank_from is None:
        return
    if not isinstance(rerank_from, int) or isinstance(rerank_from, bool) or rerank_from < num_images:
        raise UserError(f"rerank_from must be a whole number of at least num_images {num_images}, got {rerank_from!r}: that "
                        "many candidates are drawn, and the best are kept")


def check_rerank(rerank_from: int | None, num_images: int, given: Scorer | None, loaded: Scorer | None) -> Scorer | None:
    """What chooses among candidates: `given`, else `loaded`; None where there is no choice to make.

    UserError when there are fewer candidates than pictures to keep, nothing that could choose, or nothing to choose from.
    """
    check_candidates(rerank_from, num_images)
    if rerank_from is None:
        if given is not None:
            raise UserError("a matcher chooses among candidates; say how many with rerank_from, or leave the matcher out")
        return None
    judge = given if given is not None else loaded
    if not hasattr(judge, "scores"):
        found = "" if judge is None else f", got {type(judge).__name__}"
        raise UserError(f"rerank_from needs a matcher to choose the best candidates{found}; load one with load_matcher(DIR), "
                        "or with TextToImage.from_pretrained(..., matcher=DIR)")
    return judge


def keep_best(result: GenerationResult, candidates: int, num_images: int, scorer: Scorer) -> GenerationResult:
    """Of each prompt's `candidates`, which stand in a row, the num_images that fit it best, the best first, with their scores.
    Equal scores keep their order. UserError if the scorer gives no number for a picture."""
    rows: list[int] = []
    kept: list[float] = []
    for first in range(0, len(result.images), candidates):
        found = torch.as_tensor(scorer.scores(result.images[first: first + candidates], [result.prompts[first]])).float().cpu()
        if found.shape != (candidates, 1) or not bool(found.isfinite().all()):
            raise UserError(f"the matcher gave scores {list(found.shape)} for {candidates} pictures and one caption; expected "
                            f"[{candidates}, 1], all finite")
        best = found[:, 0].argsort(descending=True, stable=True)[:num_images]
        rows += (best + first).tolist()
        kept += found[best, 0].tolist()
    return replace(result, images=[result.images[row] for row in rows], image_tokens=result.image_tokens[rows],
                   prompts=[result.prompts[row] for row in rows], seeds=[result.seeds[row] for row in rows], scores=kept,
                   layouts=None if result.layouts is None else result.layouts[rows])
