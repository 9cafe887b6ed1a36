"""Bytes of each part of a sampling run: weights, caches, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenizer_image
from inference.memory.meta_device import build_on_meta, peak_on_meta
from seq2seq import TRANSFORMER_KINDS, TransformerConfig
from tokenizer_image.config import ImageTokenizerConfig
from tokenizer_image.images import float_to_pixels
from tokenizer_image.kinds import build_tokenizer
from tokenloom_common.kept_results import KeptResults, source_hash, versions

PACKAGE = Path(tokenizer_image.__file__).parent
KEPT = KeptResults("memory.json")
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Precision of the decoder's matrices -> bytes per number."""


@dataclass(frozen=True)
class TransformerSizes:
    """Counts that the memory of a transformer follows from."""

    matrices: int  # numbers in the decoder's matrices
    matrix_rows: int  # their output rows
    others: int  # all other parameters
    largest: int  # numbers in the largest matrix
    slots: int  # of a row's sequence
    text_slots: int  # those of them that are text; 0 with cross-attention

    def weight_bytes(self, weights: str, number: int) -> int:
        """Return the bytes of all weights in this precision; `number`: of one that is not int8."""
        # int8: one byte per number of a matrix and one scale per output row; the rest is not int8
        if weights == "int8":
            return self.matrices + (self.matrix_rows + self.others) * number
        return (self.matrices + self.others) * WEIGHT_BYTES[weights]


@lru_cache(maxsize=32)
def transformer_sizes(config: TransformerConfig) -> TransformerSizes:
    """Count the parameters and slots of a transformer, on the meta device."""
    model = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    modules = [*model.decoder.modules(), *model.to_logits.modules()]
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    matrices = [layer.weight.numel() for layer in linear]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TransformerSizes(
        matrices=sum(matrices), matrix_rows=sum(layer.out_features for layer in linear),
        others=parameters - sum(matrices), largest=max(matrices),
        slots=model.prefix_slots + model.image_slots, text_slots=model.text_slots)


def slot_bytes(config: TransformerConfig, number: int) -> int:
    """Return the bytes of one slot's keys and values in all decoder layers.

    number: bytes per number.
    """
    layers: int = config.decoder_layers  # type: ignore[attr-defined]
    return 2 * layers * (config.kv_heads or config.heads) * config.head_dim * number


@lru_cache(maxsize=32)
def tokenizer_bytes(config: ImageTokenizerConfig) -> int:
    """Return the bytes of both halves' parameters and buffers.

    Always float32, whatever the transformer's type.
    """
    model = build_on_meta(build_tokenizer, config)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@lru_cache(maxsize=32)
def picture_bytes(config: ImageTokenizerConfig) -> tuple[int, int]:
    """Return the peak bytes of decoding codes to uint8 pixels: (fixed, per image).

    They are kept on disk: counting them takes the start of a command half a second, since torch
    imports its compiler for operations on the meta device.
    """
    code = f"{source_hash(PACKAGE)}{source_hash(Path(__file__).parent)}"
    key = f"decoding of {config.kind} {config.plain()}; {versions('torch')} ({code})"
    kept: Any = KEPT.get(key)
    if _is_two_counts(kept):
        return kept[0], kept[1]

    counted = _count_picture_bytes(config)
    KEPT.put(key, counted)
    return counted


def _is_two_counts(value: Any) -> bool:
    """Whether a kept value is one that `_count_picture_bytes` could have returned."""
    return (isinstance(value, list) and len(value) == 2
            and all(type(number) is int and number > 0 for number in value))


def _count_picture_bytes(config: ImageTokenizerConfig) -> tuple[int, int]:
    model = build_on_meta(build_tokenizer, config).eval()
    family: Any = config  # every family has embed_dim, their common base does not
    embed_dim = family.embed_dim
    rows, columns = config.grid

    def peak(images: int) -> int:
        def decode() -> None:
            shape = (images, embed_dim, rows, columns // config.depth)
            vectors = torch.empty(shape, device="meta")
            float_to_pixels(model.decode_vectors(vectors).clamp(-1.0, 1.0))
        return peak_on_meta(decode, model)

    # the peak is linear in the number of images: two points give both terms
    one, two = peak(1), peak(2)
    per_image = two - one
    # the codebook is normalised or projected anew for each look-up, in float32
    codebook = 2 * 4 * config.codebook_size * config.depth * embed_dim
    return one - per_image + codebook, per_image
