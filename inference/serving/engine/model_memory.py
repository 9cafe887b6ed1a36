"""Memory of a model beyond what `inference.memory` predicts of sampling."""

# Axes: H heads, n slots of the sequence, T text slots

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from inference.memory.parts import transformer_sizes
from seq2seq import FrozenTextEncoder, TransformerConfig
from seq2seq.frozen_text_files import READ
from tokenloom_common.config import read_mapping
from tokenloom_common.file_contents import not_whole
from tokenloom_common.hub import resolve_folder

ATTENTION_COPIES = 4
"""Scores, masked scores, weights and their sum, at once (`inference.attention_maps`)."""


def attention_bytes(config: TransformerConfig) -> int:
    """Return the bytes of the attention [H, n, T or n] that the words of an image are read from."""
    sizes = transformer_sizes(config)
    read = sizes.slots if sizes.text_slots else config.text_length
    return 4 * ATTENTION_COPIES * config.heads * sizes.slots * read


def frozen_encoder_bytes(folder: Path, text_encoder: str | None) -> int:
    """Return the bytes of a model folder's frozen text encoder, in float32; 0 without one.

    From the headers of its files: of CLIP they also count the image tower, which is not loaded.
    text_encoder: where the encoder is, if not where the folder says.
    """
    config = read_mapping(folder / "text_tokenizer" / "config.json")
    if config.get("kind") != FrozenTextEncoder.kind:
        return 0
    name = text_encoder or str(config.get("name"))
    revision = config.get("revision") if text_encoder is None else None
    encoder = resolve_folder(name, revision, patterns=READ)
    return sum(4 * _numbers(path) for path in encoder.glob("*.safetensors"))


def _numbers(path: Path) -> int:
    """Return how many numbers a safetensors file holds, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        raise not_whole(path, "safetensors file", "copy or download it again") from None
    return sum(math.prod(shape) for shape in shapes)
