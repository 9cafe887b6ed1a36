"""Model cards of the exports: data, recipe, licence and held-out figures, as the run knows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inference.model_folder import USAGE
from inference.scoring.matcher import MatcherConfig
from inference.scoring.matcher_folder import MATCHER_USAGE, PIPELINE_TAG
from seq2seq import Seq2SeqConfig, TransformerConfig
from tokenizer_image import ImageTokenizer
from tokenloom_common.model_card import CardFacts, Measurement, model_card
from training.config.matcher import MatcherRunConfig
from training.config.run import DataConfig, RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.data.origin import data_origin

NOT_LEARNED_FROM = ("run_dir", "card", "checkpoint", "log")
"""Sections of the config about where a run was and how it was watched, which a card leaves out."""
LIMITS = ("The pictures follow the training data in content, style and bias. The licence of the "
          "training pictures may bind this model too.")
MATCHER_LIMITS = ("Scores compare captions of one picture, or pictures of one caption; they are "
                  "no probabilities. The bias of the training pictures and captions is in them.")
TOKENIZER_USAGE = """from tokenloom import load_tokenizer

tokenizer = load_tokenizer("path/or/hub-id")
codes = tokenizer.encode(image)  # [B, 3, S, S] in [-1, 1] -> [B, h, w]
image = tokenizer.decode(codes)"""

Fact = tuple[str, str]


@dataclass(frozen=True)
class RunResult:
    """A run as its card tells it, whatever it trained.

    rows: training images; facts: rows of the table that only this kind of model has; measured:
    name, the Hub's metric and value of the held-out split.
    """

    run: RunConfig
    data: DataConfig
    rows: int
    facts: tuple[Fact, ...]
    measured: tuple[tuple[str, str, float], ...]
    notes: str

    def card(self, **about: Any) -> str:
        """Return the card in the Hub's form; about: further fields of CardFacts."""
        run, origin = self.run, data_origin(self.data.path)
        measured = tuple(Measurement(*figure, dataset=origin.name, split=self.data.validation_split)
                         for figure in self.measured)
        config = {name: value for name, value in run.plain().items()
                  if name not in NOT_LEARNED_FROM}
        notes = f"{self.notes}\n\n{run.card.notes}" if run.card.notes else self.notes
        return model_card(CardFacts(facts=(*self._recipe(origin.name), *self.facts),
                                    measured=measured, license=run.card.license,
                                    data_license=origin.license, attribution=origin.attribution,
                                    datasets=(origin.hub_id,) if origin.hub_id else (), notes=notes,
                                    config=config, **about))

    def _recipe(self, data_name: str) -> list[Fact]:
        train, optim = self.run.train, self.run.optim
        split = f", split `{self.data.split}`" if self.data.split else ""
        recipe = [("training pictures", f"{self.rows:,} (`{data_name}`{split})"),
                  ("steps x batch", f"{train.steps:,} x {train.batch_size}"),
                  ("optimizer",
                   f"{optim.name}, learning rate {optim.lr:g} ({optim.schedule}), weight decay "
                   f"{optim.weight_decay:g}"),
                  ("seed", str(self.run.seed))]
        init_from = getattr(self.run, "init_from", None)  # which a matcher does not have
        if init_from:
            recipe.append(("begun with the weights of", f"`{init_from}`"))
        return recipe


def seq2seq_card(run: Seq2SeqRunConfig, model: TransformerConfig, rows: int,
                 held_out_loss: float | None) -> str:
    """Return the card of a model folder. Figures that were not measured are said to be so."""
    if isinstance(model, Seq2SeqConfig):
        family = "An encoder-decoder transformer"
        layers = f"{model.encoder_layers} + {model.decoder_layers}"
    else:
        family = "A decoder-only transformer"
        layers = str(len(model.patterns(getattr(model, "layers", 0))))
    facts = (_code_grid(model), ("transformer", f"{layers} layers, width {model.width}"))

    measured: tuple[tuple[str, str, float], ...] = ()
    if held_out_loss is not None:
        # above 709 the exponential of a float64 overflows
        perplexity = math.exp(min(held_out_loss, 700))
        measured = (("held-out loss, nats a token", "loss", held_out_loss),
                    ("held-out perplexity, codes", "perplexity", perplexity))
    return RunResult(run, run.data, rows, facts, measured, LIMITS).card(
        title="Text-to-image model",
        summary=f"{family} over the codes of an image tokenizer, trained with Tokenloom.",
        usage=USAGE, pipeline_tag="text-to-image", tags=(model.kind,))


def tokenizer_card(run: TokenizerRunConfig, model: ImageTokenizer, rows: int,
                   report: dict[str, Any] | None) -> str:
    """Return the card of a tokenizer; report: evaluate_reconstruction on the held-out split."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = (("pictures", f"{model.config.resolution} px"), _code_grid(model),
             ("parameters", f"{parameters:,}"))

    measured: tuple[tuple[str, str, float], ...] = ()
    if report is not None:
        measured = (("held-out PSNR, dB", "psnr", report["psnr"]),
                    ("share of the codes in use", "codebook_usage", report["codebook_usage"]),
                    ("perplexity of the codes", "codebook_perplexity",
                     report["codebook_perplexity"]))
        kept = report.get("reconstruction_spread")  # none of images that do not differ
        if kept is not None:
            what = "share kept of what tells pictures apart"
            measured = (*measured, (what, "reconstruction_spread", kept))
    return RunResult(run, run.data, rows, facts, measured, LIMITS).card(
        title="Image tokenizer",
        summary=f"Pictures to discrete codes and back (`{model.kind}`), trained with Tokenloom.",
        usage=TOKENIZER_USAGE, task="image-to-image", tags=("image-tokenizer", model.kind))


def matcher_card(run: MatcherRunConfig, model: MatcherConfig, rows: int,
                 retrieval: dict[str, Any] | None) -> str:
    """Return the card of a matcher; retrieval: of evaluate_retrieval on the held-out split."""
    objective = "contrastive"
    if run.loss.mlm_weight:
        objective += f", and masked words (weight {run.loss.mlm_weight})"
    facts = (("objective", objective), ("pictures", f"{model.image.resolution} px"),
             ("text tower", f"{model.text.layers} layers, width {model.text.width}"))

    measured: tuple[tuple[str, str, float], ...] = ()
    if retrieval is not None:
        among = f"picture -> its caption among {retrieval['captions']}"
        # top 1 depends on the number of captions, so it stands beside chance
        top1 = f"{among}, top 1 (chance {retrieval['chance_top1']:.3f})"
        measured = ((top1, "accuracy", retrieval["top1"]),
                    (f"{among}, top 5", "top_5_accuracy", retrieval["top5"]))
    return RunResult(run, run.data, rows, facts, measured, MATCHER_LIMITS).card(
        title="Matcher: how well a caption fits a picture",
        summary="A small contrastive image-text model, trained with Tokenloom. It knows its own "
                "training pictures' world and nothing else.",
        usage=MATCHER_USAGE, pipeline_tag=PIPELINE_TAG, tags=("matcher",))


def _code_grid(model: TransformerConfig | ImageTokenizer) -> Fact:
    rows, columns = model.grid
    return "code grid, codebook", f"{rows} x {columns}, {model.codebook_size}"
