"""Keep the best of N candidates by score."""

from __future__ import annotations

from dataclasses import replace

import torch

from inference.results import GenerationResult
from inference.scoring.scorer import Scorer
from tokenloom_common.errors import UserError


def check_candidates(rerank_from: int | None, num_images: int) -> None:
    """Raise UserError if there are fewer candidates than images to keep; None: no reranking."""
    if rerank_from is None:
        return
    is_number = isinstance(rerank_from, int) and not isinstance(rerank_from, bool)
    if not is_number or rerank_from < num_images:
        raise UserError(
            f"rerank_from must be a whole number of at least num_images {num_images}, "
            f"got {rerank_from!r}: that many candidates are drawn, and the best are kept")


def check_rerank(rerank_from: int | None, num_images: int, given: Scorer | None,
                 loaded: Scorer | None) -> Scorer | None:
    """Return the scorer to rerank with: `given`, else `loaded`; None without reranking.

    UserError for fewer candidates than images to keep, for candidates without a scorer, and for a
    `given` scorer without candidates.
    """
    check_candidates(rerank_from, num_images)
    if rerank_from is None:
        if given is not None:
            raise UserError("a matcher chooses among candidates; say how many with rerank_from, "
                            "or leave the matcher out")
        return None
    scorer = given if given is not None else loaded
    # by its method, since a Scorer may be any object of the caller's
    if not hasattr(scorer, "scores"):
        found = "" if scorer is None else f", got {type(scorer).__name__}"
        raise UserError(
            f"rerank_from needs a matcher to choose the best candidates{found}; load one with "
            "load_matcher(DIR), or with TextToImage.from_pretrained(..., matcher=DIR)")
    return scorer


def keep_best(result: GenerationResult, candidates: int, num_images: int,
              scorer: Scorer) -> GenerationResult:
    """Keep the num_images best of each prompt's `candidates`, best first, with their scores.

    result: the candidates of a prompt follow one another. Equal scores keep their order. UserError
    if the scorer does not return one finite number per image.
    """
    rows: list[int] = []
    kept: list[float] = []
    for first in range(0, len(result.images), candidates):
        images = result.images[first: first + candidates]
        scores = torch.as_tensor(scorer.scores(images, [result.prompts[first]])).float().cpu()
        # a NaN would sort anywhere, and nobody would notice
        if scores.shape != (candidates, 1) or not bool(scores.isfinite().all()):
            raise UserError(
                f"the matcher gave scores {list(scores.shape)} for {candidates} pictures and one "
                f"caption; expected [{candidates}, 1], all finite")
        best = scores[:, 0].argsort(descending=True, stable=True)[:num_images]
        rows += (best + first).tolist()
        kept += scores[best, 0].tolist()

    return replace(result.keep(rows), scores=kept)
