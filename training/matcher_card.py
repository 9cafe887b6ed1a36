"""The README.md of an exported matcher, with what the run knows about itself."""

from __future__ import annotations

from typing import Any

from inference.scoring.matcher import MatcherConfig
from inference.scoring.matcher_folder import MATCHER_USAGE, PIPELINE_TAG
from tokenloom_common.model_card import model_card
from training.config.matcher import MatcherRunConfig
from training.run_card import run_card

NOTES = ("Scores compare captions of one picture, or pictures of one caption; they are no probabilities. The bias of the "
         "training pictures and captions is in them.")


def matcher_card(run: MatcherRunConfig, model: MatcherConfig, rows: int, retrieval: dict[str, Any] | None) -> str:
    """A model card in the Hub's form. Figures that were not measured are said to be so."""
    objective = "contrastive" + (f", and masked words (weight {run.loss.mlm_weight})" if run.loss.mlm_weight else "")
    facts = [("objective", objective), ("pictures", f"{model.image.resolution} px"),
             ("text tower", f"{model.text.layers} layers, width {model.text.width}")]
    measured: tuple[tuple[str, str, float], ...] = ()
    if retrieval is not None:
        among = f"picture -> its caption among {retrieval['captions']}"
        measured = ((f"{among}, top 1 (chance {retrieval['chance_top1']:.3f})", "accuracy", retrieval["top1"]),
                    (f"{among}, top 5", "top_5_accuracy", retrieval["top5"]))
    return model_card(run_card(
        run, run.data, rows, tuple(facts), measured, NOTES, title="Matcher: how well a caption fits a picture",
        summary="A small contrastive image-text model, trained with Tokenloom. It knows its own training pictures' world and "
                "nothing else.",
        usage=MATCHER_USAGE, pipeline_tag=PIPELINE_TAG, tags=("matcher",)))
