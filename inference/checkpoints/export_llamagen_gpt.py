"""Our transformers as LlamaGen's: the way back, bit for bit."""

# Axes: D width, I inner width of the feed-forward, T text slots, F width of features

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.checkpoints.formats.llamagen_gpt import NULL, rule_of
from inference.checkpoints.rules import tensor_names
from inference.memory.meta_device import build_on_meta
from inference.model_folder import INDEX_NAME as MODEL_INDEX
from inference.model_folder import PARTS
from seq2seq import ClassLabels, DecoderOnly, DecoderOnlyConfig, FrozenTextConfig, FrozenTextEncoder
from seq2seq.frozen_text import read_null_features
from seq2seq.presets import LLAMAGEN
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import check_tensors, read_config, read_tensors

_IMAGE, _TRANSFORMER, _TEXT = PARTS
_WANTED: dict[str, Any] = {
    **{name: value for name, value in LLAMAGEN.items() if name not in ("kind", "dropout", "text_projection")},
    "norm_placement": "pre", "norm_bias": False, "embedding_norm": False, "attention_bias": False, "predict_text": False,
    "text_padding": "masked", "layout_grid": None}
"""Fields of our config that its code fixes."""


def llamagen_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a transformer's folder, or of the one in a model folder, under LlamaGen's names.

    UserError naming the field that its code cannot express.
    """
    whole = (folder / MODEL_INDEX).is_file()
    place = folder / _TRANSFORMER if whole else folder
    _refuse_kind(place)
    config = read_config(place, DecoderOnly.kind, DecoderOnlyConfig)
    _refuse(config, place)
    extra = _null_features(folder if whole else None, config, place)
    ours = read_tensors(place)
    wanted = {name: tuple(tensor.shape) for name, tensor in build_on_meta(DecoderOnly, config).state_dict().items()}
    check_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in ours.items()}, place)
    return {**_renamed(ours, config), **extra}


def _renamed(ours: dict[str, Tensor], config: DecoderOnlyConfig) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix of theirs, our first matrix of the feed-forward two."""
    parts: dict[str, list[Tensor]] = {}
    state: dict[str, Tensor] = {}
    for name in tensor_names(DecoderOnly, config):
        sources = rule_of(name, config).sources
        if len(sources) == 2:
            state |= dict(zip(sources, ours[name].chunk(2), strict=True))
        else:
            parts.setdefault(sources[0], []).append(ours[name])  # queries come first, then keys, then values
    state |= {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in parts.items()}
    return {name: tensor.clone() for name, tensor in state.items()}  # each in memory of its own: a view is saved whole


def _refuse_kind(place: Path) -> None:
    path = place / "config.json"
    kind = read_mapping(path).get("kind") if path.is_file() else DecoderOnly.kind  # what is missing is said later
    if kind != DecoderOnly.kind:
        raise UserError(f"{place}: LlamaGen cannot express kind {kind!r}, only {DecoderOnly.kind!r}")


def _refuse(config: DecoderOnlyConfig, place: Path) -> None:
    """UserError for the first field that is not as in LlamaGen's code."""
    wanted = dict(_WANTED)
    if config.text_feature_width is not None:
        wanted["text_projection"] = LLAMAGEN["text_projection"]
    else:
        wanted["text_length"] = 1
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(f"{place}: LlamaGen cannot express {name} {getattr(config, name)!r}, only {value!r}")
    if set(config.patterns(config.layers)) != {"full"}:
        raise UserError(f"{place}: LlamaGen cannot express attention {config.patterns(config.layers)}, only 'full'")
    if config.grid[0] != config.grid[1]:
        raise UserError(f"{place}: LlamaGen cannot express grid {config.grid}, only a square one")
    if config.heads * config.head_dim != config.width:
        raise UserError(f"{place}: LlamaGen cannot express head_dim {config.head_dim}, only width / heads = "
                        f"{config.width / config.heads:g}")


def _null_features(folder: Path | None, config: DecoderOnlyConfig, place: Path) -> dict[str, Tensor]:
    """What a transformer of text keeps beside its weights. UserError where the text is read in another way than there."""
    kind = ClassLabels.kind if config.text_feature_width is None else FrozenTextEncoder.kind
    if folder is None:
        if kind == FrozenTextEncoder.kind:
            raise UserError(f"{place}: a transformer of text alone; its {NULL} is in its model folder's {_TEXT}: give the "
                            "whole model folder")
        return {}
    text = folder / _TEXT
    found = read_mapping(text / "config.json").get("kind")
    if found != kind:
        raise UserError(f"{text}: LlamaGen cannot express kind {found!r}, only {kind!r} here")
    if kind == ClassLabels.kind:
        return {}
    encoder = read_config(text, kind, FrozenTextConfig)
    for name, value in (("padding", "left"), ("null_features", True)):
        if getattr(encoder, name) != value:
            raise UserError(f"{text}: LlamaGen cannot express {name} {getattr(encoder, name)!r}, only {value!r}")
    return {NULL: read_null_features(text, encoder)}
