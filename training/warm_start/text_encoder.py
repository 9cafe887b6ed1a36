"""Start an encoder-decoder with the text encoder of a trained matcher, as Parti starts with a
pretrained one (Yu et al. 2022, https://arxiv.org/abs/2206.10789)."""

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

FREE = ("dropout",)
"""Fields without weights, which are each run's own choice."""


def matcher_text_source(folder: str | Path, text_encoder: str | None = None) -> TextSource:
    """Load the text source of a matcher, which a run that starts from it must read with."""
    return load_text_source(find_matcher_folder(folder) / "text_tokenizer", text_encoder)


def text_source_of_run(text: Seq2SeqTextConfig, data: CaptionRows, kept: Path | None) -> TextSource:
    """Load the text source of the matcher that a run starts from, or choose one.

    kept: the text source of the run that is continued. UserError when text.kind is not the
    matcher's.
    """
    if text.start_from is None:
        return choose_text_source(text, data, kept)
    if kept is None:  # a continued run does not need the matcher's folder any more
        source = matcher_text_source(text.start_from, text.encoder)
    else:
        source = load_text_source(kept, text.encoder)
    if source.kind != text.kind:
        raise UserError(f"text.start_from {text.start_from}: the matcher's text.kind is "
                        f"{source.kind}, this run's {text.kind}; set text.kind {source.kind}")
    return source


def check_text_start(config: TransformerConfig, folder: str | Path) -> None:
    """Raise UserError, naming the fields, where the model cannot take the matcher's encoder.

    Reads no weights, so that a run can be refused before anything is touched.
    """
    if not isinstance(config, Seq2SeqConfig):
        raise UserError(f"text.start_from {folder}: a model of kind {config.kind} has no text "
                        f"encoder of its own to start; use model.kind {Seq2SeqConfig.kind}, or "
                        "leave text.start_from out")
    matcher = read_config(find_matcher_folder(folder) / "matcher", Matcher.kind, MatcherConfig)
    differing = differences(matcher.text, config)
    if differing:
        raise UserError(f"text.start_from {folder}: its text encoder differs from this run's in "
                        f"{', '.join(differing)}; give model.* the same values, or train a "
                        "matcher with model.text.preset")


def take_text_encoder(model: ImageTransformer, folder: str | Path,
                      text_encoder: str | None = None) -> TextSource:
    """Copy the text tower of the matcher at `folder` into `model` -> its text source.

    In place. UserError as in check_text_start, and for a damaged folder.
    """
    check_text_start(model.config, folder)
    scorer = load_matcher_folder(folder, "cpu", text_encoder=text_encoder)
    assert isinstance(model, EncoderDecoder), "its config says so"
    # both are TextEncoders, so that strict loading checks names and shapes once more
    model.text_encoder.load_state_dict(scorer.matcher.text_encoder.state_dict())
    log.info("text encoder: %d layers of width %d taken over from %s",
             scorer.matcher.config.text.layers, model.config.width, folder)
    return scorer.text_source


def differences(tower: TextTowerConfig, model: Seq2SeqConfig) -> list[str]:
    """Return 'width (32 there, 64 here)' for every field in which two text encoders differ."""
    pairs = {name: (_field(tower, name), _field(model, name)) for name in LayersConfig.model_fields
             if name not in FREE}
    # the one field that the two configs name differently
    pairs["encoder_layers"] = (tower.layers, model.encoder_layers)
    return [f"{name} ({there} there, {here} here)" for name, (there, here) in pairs.items()
            if there != here]


def _field(config: LayersConfig, name: str) -> object:
    value = getattr(config, name)
    if name == "rotary" and value != "none":
        return "1d"  # text has one axis, whatever the image has
    return value
