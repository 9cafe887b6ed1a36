"""What every trained model's card says: the data, the recipe, the licence, as the run knows them."""

from __future__ import annotations

import math
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
"""Sections of the config that say where a run was and how it was watched."""
LIMITS = ("The pictures follow the training data in content, style and bias. The licence of the training pictures may bind "
          "this model too.")


def run_card(run: RunConfig, data: DataConfig, rows: int, facts: tuple[tuple[str, str], ...],
             measured: tuple[tuple[str, str, float], ...], notes: str, **about: Any) -> CardFacts:
    """The facts of a run's card. rows: training pictures; facts: rows of the table that only this kind of model has;
    measured: name, the Hub's metric and value of what the held-out split said; about: further fields of CardFacts."""
    origin, start = data_origin(data.path), getattr(run, "init_from", None)  # a matcher begins from nothing
    split = f", split `{data.split}`" if data.split else ""
    train, optim = run.train, run.optim
    recipe = (("training pictures", f"{rows:,} (`{origin.name}`{split})"),
              ("steps x batch", f"{train.steps:,} x {train.batch_size}"),
              ("optimizer", f"{optim.name}, learning rate {optim.lr:g} ({optim.schedule}), weight decay "
                            f"{optim.weight_decay:g}"),
              ("seed", str(run.seed)), *((("begun with the weights of", f"`{start}`"),) if start else ()))
    config = {name: value for name, value in run.plain().items() if name not in NOT_LEARNED_FROM}
    return CardFacts(
        facts=(*recipe, *facts),
        measured=tuple(Measurement(*one, dataset=origin.name, split=data.validation_split) for one in measured),
        license=run.card.license, data_license=origin.license, attribution=origin.attribution,
        datasets=(origin.hub_id,) if origin.hub_id else (),
        notes=f"{notes}\n\n{run.card.notes}" if run.card.notes else notes, config=config, **about)


def seq2seq_card(run: Seq2SeqRunConfig, model: TransformerConfig, rows: int, held_out_loss: float | None) -> str:
    """A model card in the Hub's form. Figures that were not measured are said to be so."""
    if isinstance(model, Seq2SeqConfig):
        family, layers = "An encoder-decoder transformer", f"{model.encoder_layers} + {model.decoder_layers}"
    else:
        family, layers = "A decoder-only transformer", f"{len(model.patterns(getattr(model, 'layers', 0)))}"
    measured = () if held_out_loss is None else (
        ("held-out loss, nats a token", "loss", held_out_loss),
        ("held-out perplexity, codes", "perplexity", math.exp(min(held_out_loss, 700))))
    return model_card(run_card(
        run, run.data, rows,
        (("code grid, codebook", f"{model.grid[0]} x {model.grid[1]}, {model.codebook_size}"),
         ("transformer", f"{layers} layers, width {model.width}")), measured, LIMITS,
        title="Text-to-image model", summary=f"{family} over the codes of an image tokenizer, trained with Tokenloom.",
        usage=USAGE, pipeline_tag="text-to-image", tags=(model.kind,)))


def tokenizer_card(run: TokenizerRunConfig, model: ImageTokenizer, rows: int, report: dict[str, Any] | None) -> str:
    """As seq2seq_card, of an image tokenizer; report: of evaluate_reconstruction on the held-out split."""
    measured = () if report is None else (
        ("held-out PSNR, dB", "psnr", report["psnr"]),
        ("share of the codes in use", "codebook_usage", report["codebook_usage"]),
        ("perplexity of the codes", "codebook_perplexity", report["codebook_perplexity"]))
    config = model.config
    usage = ('from tokenloom import load_tokenizer\n\ntokenizer = load_tokenizer("path/or/hub-id")\n'
             "codes = tokenizer.encode(image)  # [B, 3, S, S] in [-1, 1] -> [B, h, w]\nimage = tokenizer.decode(codes)")
    return model_card(run_card(
        run, run.data, rows,
        (("pictures", f"{config.resolution} px"),
         ("code grid, codebook", f"{model.grid[0]} x {model.grid[1]}, {model.codebook_size}"),
         ("parameters", f"{sum(p.numel() for p in model.parameters()):,}")), measured, LIMITS,
        title="Image tokenizer", summary=f"Pictures to discrete codes and back (`{model.kind}`), trained with Tokenloom.",
        usage=usage, task="image-to-image", tags=("image-tokenizer", model.kind)))


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
