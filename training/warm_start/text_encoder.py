"""Begin an encoder-decoder's training with the text encoder of a trained matcher, as Parti begins with a pretrained one
(Yu et al. 2022, https://arxiv.org/abs/2206.10789)."""

from __future__ import annotations

import logging
from pathlib import Path

from inference.scoring.matcher import Matcher, MatcherConfig, TextTowerConfig
from inference.scoring.matcher_folder import find_matcher_folder, load_matcher_folder
from seq2seq import (
    EncoderDecoder,
    ImageTransformer,
    Seq2SeqConfig,
    TextSource,
    TransformerConfig,
    load_text_source,
)
from seq2seq.config import LayersConfig
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import read_config
from training.config.seq2seq import Seq2SeqTextConfig
from training.data.text_input import CaptionRows, choose_text_source

log = logging.getLogger(__name__)

_FREE = ("dropout",)  # has no weights, and is each run's own choice


def matcher_text_source(folder: str | Path, text_encoder: str | None = None) -> TextSource:
    """The text tokenizer (or frozen text encoder) of a matcher: what a run must read its captions with to start from it."""
    return load_text_source(find_matcher_folder(folder) / "text_tokenizer", text_encoder)


def text_source_of_run(text: Seq2SeqTextConfig, data: CaptionRows, kept: Path | None) -> TextSource:
    """What a run reads its captions with: the matcher's that it starts from, or as choose_text_source says. `kept` is where
    the run that is continued has it. UserError when text.kind is not the matcher's."""
    if text.start_from is None:
        return choose_text_source(text, data, kept)
    source = matcher_text_source(text.start_from, text.encoder) if kept is None else load_text_source(kept, text.encoder)
    if source.kind != text.kind:
        raise UserError(f"text.start_from {text.start_from}: the matcher's text.kind is {source.kind}, this run's {text.kind}; "
                        f"set text.kind {source.kind}")
    return source


def check_text_start(config: TransformerConfig, folder: str | Path) -> None:
    """UserError when a model of this config has no text encoder, or, naming the fields, another one than the matcher's: in
    shape or in how it reads text. Reads no weights, so it can be asked before anything is touched."""
    if not isinstance(config, Seq2SeqConfig):
        raise UserError(f"text.start_from {folder}: a model of kind {config.kind} has no text encoder of its own to start; "
                        f"use model.kind {Seq2SeqConfig.kind}, or leave text.start_from out")
    matcher = read_config(find_matcher_folder(folder) / "matcher", Matcher.kind, MatcherConfig)
    differing = differences(matcher.text, config)
    if differing:
        raise UserError(f"text.start_from {folder}: its text encoder differs from this run's in {', '.join(differing)}; "
                        "give model.* the same values, or train a matcher with model.text.preset")


def take_text_encoder(model: ImageTransformer, folder: str | Path, text_encoder: str | None = None) -> TextSource:
    """Copy the text tower of the matcher at `folder` into `model`, in place -> the text tokenizer that it was trained with.

    UserError as in check_text_start, and for a damaged folder.
    """
    check_text_start(model.config, folder)
    scorer = load_matcher_folder(folder, "cpu", text_encoder=text_encoder)
    assert isinstance(model, EncoderDecoder), "its config says so"
    model.text_encoder.load_state_dict(scorer.matcher.text_encoder.state_dict())
    log.info("text encoder: %d layers of width %d taken over from %s", scorer.matcher.config.text.layers,
             model.config.width, folder)
    return scorer.text_source


def differences(tower: TextTowerConfig, model: Seq2SeqConfig) -> list[str]:
    """'width (32 there, 64 here)' for every field in which two text encoders differ."""
    def read(config: LayersConfig, name: str) -> object:
        value = getattr(config, name)
        return ("none" if value == "none" else "1d") if name == "rotary" else value  # text has one axis whatever the image has

    pairs = {name: (read(tower, name), read(model, name)) for name in LayersConfig.model_fields if name not in _FREE}
    pairs["encoder_layers"] = (tower.layers, model.encoder_layers)
    return [f"{name} ({theirs} there, {ours} here)" for name, (theirs, ours) in pairs.items() if theirs != ours]
