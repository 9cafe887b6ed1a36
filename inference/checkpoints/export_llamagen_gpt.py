"""Write our transformers as LlamaGen's, bit for bit."""

# Axes: D width, I inner width of the feed-forward, T text slots, F width of features

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.checkpoints.formats.llamagen_gpt import NULL, rule_of
from inference.checkpoints.rules import tensor_names
from inference.checkpoints.stored import read_checked
from inference.model_folder import INDEX_NAME as MODEL_INDEX
from inference.model_folder import PARTS
from seq2seq import ClassLabels, DecoderOnly, DecoderOnlyConfig, FrozenTextConfig, FrozenTextEncoder
from seq2seq.frozen_text import read_null_features
from seq2seq.presets import LLAMAGEN
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import read_config

_, _TRANSFORMER, _TEXT = PARTS
_FREE = ("kind", "dropout", "text_projection")  # compared elsewhere, or of training only
_FIXED: dict[str, Any] = {
    **{name: value for name, value in LLAMAGEN.items() if name not in _FREE},
    "norm_placement": "pre", "norm_bias": False, "embedding_norm": False, "attention_bias": False,
    "predict_text": False, "text_padding": "masked", "layout_grid": None}
"""Fields of our config that LlamaGen's code fixes."""


def llamagen_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer (of its own or a model folder) under LlamaGen's names.

    UserError naming the field that LlamaGen's code cannot express.
    """
    is_model = (folder / MODEL_INDEX).is_file()
    place = folder / _TRANSFORMER if is_model else folder
    _refuse_kind(place)  # before read_config, whose message does not speak of LlamaGen
    config = read_config(place, DecoderOnly.kind, DecoderOnlyConfig)
    _refuse_fields(config, place)
    # all refusals come before gigabytes of weights
    null_features = _null_features(folder if is_model else None, config, place)
    return {**_renamed(read_checked(DecoderOnly, config, place), config), **null_features}


def _renamed(tensors: dict[str, Tensor], config: DecoderOnlyConfig) -> dict[str, Tensor]:
    """Join queries, keys and values to one matrix, split our first feed-forward matrix into two."""
    state: dict[str, Tensor] = {}
    joined: dict[str, list[Tensor]] = {}
    for name in tensor_names(DecoderOnly, config):
        sources = rule_of(name, config).sources  # the conversion's own table, read backwards
        if len(sources) == 2:
            halves = tensors[name].chunk(2)  # [2 I, D] -> two of [I, D]
            state |= dict(zip(sources, halves, strict=True))
        else:
            # names are in the state dict's order: queries come first, then keys, then values
            joined.setdefault(sources[0], []).append(tensors[name])

    for source, parts in joined.items():
        state[source] = parts[0] if len(parts) == 1 else torch.cat(parts)
    # torch.save writes the whole storage of a view
    return {name: tensor.clone() for name, tensor in state.items()}


def _refuse_kind(place: Path) -> None:
    path = place / "config.json"
    if not path.is_file():
        return  # read_config reports a missing file
    kind = read_mapping(path).get("kind")
    if kind != DecoderOnly.kind:
        raise UserError(f"{place}: LlamaGen cannot express kind {kind!r}, only "
                        f"{DecoderOnly.kind!r}")


def _refuse_fields(config: DecoderOnlyConfig, place: Path) -> None:
    """UserError for the first field that is not as in LlamaGen's code."""
    if config.text_feature_width is not None:
        fixed = {**_FIXED, "text_projection": LLAMAGEN["text_projection"]}
    else:
        fixed = {**_FIXED, "text_length": 1}  # the class is the one text position
    for name, value in fixed.items():
        found = getattr(config, name)
        if found != value:
            raise UserError(f"{place}: LlamaGen cannot express {name} {found!r}, only {value!r}")

    patterns = config.patterns(config.layers)
    if set(patterns) != {"full"}:
        raise UserError(f"{place}: LlamaGen cannot express attention {patterns}, only 'full'")
    if config.grid[0] != config.grid[1]:
        raise UserError(f"{place}: LlamaGen cannot express grid {config.grid}, only a square one")
    if config.heads * config.head_dim != config.width:  # its code divides the width by the heads
        raise UserError(f"{place}: LlamaGen cannot express head_dim {config.head_dim}, only width "
                        f"/ heads = {config.width / config.heads:g}")


def _null_features(folder: Path | None, config: DecoderOnlyConfig, place: Path
                   ) -> dict[str, Tensor]:
    """The features of no caption [T, F], which LlamaGen keeps in the transformer; {} for classes.

    folder: the whole model folder, None for a transformer alone. UserError if our text encoder
    reads captions otherwise.
    """
    of_classes = config.text_feature_width is None
    if folder is None:
        if not of_classes:
            raise UserError(f"{place}: a transformer of text alone; its {NULL} is in its model "
                            f"folder's {_TEXT}: give the whole model folder")
        return {}

    text = folder / _TEXT
    wanted = ClassLabels.kind if of_classes else FrozenTextEncoder.kind
    kind = read_mapping(text / "config.json").get("kind")
    if kind != wanted:
        raise UserError(f"{text}: LlamaGen cannot express kind {kind!r}, only {wanted!r} here")
    if of_classes:
        return {}

    encoder = read_config(text, kind, FrozenTextConfig)
    # its loader pads captions on the left
    for name, value in (("padding", "left"), ("null_features", True)):
        found = getattr(encoder, name)
        if found != value:
            raise UserError(f"{text}: LlamaGen cannot express {name} {found!r}, only {value!r}")
    return {NULL: read_null_features(text, encoder)}
