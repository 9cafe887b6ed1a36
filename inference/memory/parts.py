"""Bytes of each part of a sampling run: weights, caches, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from inference.memory.meta_device import build_on_meta, peak_on_meta
from seq2seq import TRANSFORMER_KINDS, TransformerConfig
from tokenizer_image.config import ImageTokenizerConfig
from tokenizer_image.images import float_to_pixels
from tokenizer_image.kinds import build_tokenizer

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Precision of the decoder's matrices -> bytes a number."""


@dataclass(frozen=True)
class _Sizes:
    """Of a transformer: numbers in the decoder's matrices and their output rows, all other parameters, the largest matrix;
    slots of a row's sequence, and those of them that are text (0 where the text is attended to across)."""

    matrices: int
    matrix_rows: int
    others: int
    largest: int
    slots: int
    text_slots: int

    def weight_bytes(self, weights: str, number: int) -> int:
        """int8: one byte a number of a matrix and a scale an output row; the rest, and the text encoder, in `number` bytes."""
        if weights == "int8":
            return self.matrices + (self.matrix_rows + self.others) * number
        return (self.matrices + self.others) * WEIGHT_BYTES[weights]


@lru_cache(maxsize=32)
def _sizes(config: TransformerConfig) -> _Sizes:
    model = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    linear = [m for part in (model.decoder, model.to_logits) for m in part.modules() if isinstance(m, nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in linear)
    return _Sizes(matrices, sum(layer.out_features for layer in linear), sum(p.numel() for p in model.parameters()) - matrices,
                  max(layer.weight.numel() for layer in linear), model.prefix_slots + model.image_slots, model.text_slots)


def _slot_bytes(config: TransformerConfig, number: int) -> int:
    """Keys and values of one slot in all decoder layers."""
    layers: int = config.decoder_layers  # type: ignore[attr-defined]
    return 2 * layers * (config.kv_heads or config.heads) * config.head_dim * number


@lru_cache(maxsize=32)
def _tokenizer_bytes(config: ImageTokenizerConfig) -> int:
    """Parameters and buffers of both halves; an image tokenizer is float32 whatever the transformer is."""
    model = build_on_meta(build_tokenizer, config)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@lru_cache(maxsize=32)
def picture_bytes(config: ImageTokenizerConfig) -> tuple[int, int]:
    """(bytes however many, bytes a picture) at the peak of decoding codes to pixels uint8."""
    model = build_on_meta(build_tokenizer, config).eval()
    family: Any = config
    (rows, columns), length = config.grid, family.embed_dim

    def peak(pictures: int) -> int:
        def decode() -> None:
            vectors = torch.empty(pictures, length, rows, columns // config.depth, device="meta")
            float_to_pixels(model.decode_vectors(vectors).clamp(-1.0, 1.0))
        return peak_on_meta(decode, model)

    one, two = peak(1), peak(2)
    codebook = 2 * 4 * config.codebook_size * config.depth * length  # normalised or mapped anew for each look-up
    return 2 * one - two + codebook, two - one
