"""Keep the best of N candidates by score."""

from __future__ import annotations

from dataclasses import replace

import torch

from inference.results import GenerationResult
from inference.scoring.scorer import Scorer
from tokenloom_common.errors import UserError


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
