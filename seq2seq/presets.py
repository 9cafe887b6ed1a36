"""Presets of transformers: all settings that do not follow from the tokenizers.

Published sizes are as in their papers and code. Parti: Yu et al. 2022, table 1,
https://arxiv.org/abs/2206.10789. DALL-E: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092.
LlamaGen: Sun et al. 2024, table 1, https://arxiv.org/abs/2406.06525. ruDALL-E, minDALL-E and
DALL-E mini: their public code.
"""

from __future__ import annotations

from typing import Any

_PARTI = {
    "kind": "encoder_decoder", "feedforward": "gelu", "feedforward_multiplier": 4.0,
    "feedforward_bias": False, "norm": "layernorm", "qk_norm": False, "attention": ("convolution",),
    "dropout": 0.1,
    # the paper does not say how positions are encoded; these need no parameters
    "rotary": "2d", "learned_positions": False}
_PARTI_MODERN = {
    "kind": "encoder_decoder", "feedforward": "swiglu", "feedforward_multiplier": 8 / 3,
    "feedforward_bias": False, "norm": "rmsnorm", "qk_norm": True, "rotary": "2d",
    "learned_positions": False}
_PARTI_SIZES = {  # encoder layers, decoder layers, width, heads of 64
    "350m": (12, 12, 1024, 16),
    "750m": (12, 36, 1024, 16),
    "3b": (12, 36, 2048, 32),
    "20b": (16, 64, 4096, 64)}

_GPT = {
    "kind": "decoder_only", "feedforward": "gelu", "feedforward_multiplier": 4.0,
    "norm": "layernorm", "qk_norm": False, "rotary": "none", "learned_positions": True,
    "begin_of_image": False, "predict_text": True, "text_padding": "learned"}
# column where (layer - 2) % 4 = 0, the first layer being 1
_DALLE_ATTENTION = ("row", "column", "row", "row")

LLAMAGEN: dict[str, Any] = {
    "kind": "decoder_only", "feedforward": "swiglu", "feedforward_bias": False, "norm": "rmsnorm",
    "norm_eps": 1e-5, "qk_norm": False, "rotary": "2d", "learned_positions": False,
    "begin_of_image": False, "text_positions": "blind", "text_projection": "mlp", "dropout": 0.1}
"""Settings of every LlamaGen size."""
_LLAMAGEN_SIZES = {  # layers, heads, width, inner width of the feed-forward
    "b": (12, 12, 768, 2048),
    "l": (24, 16, 1024, 2816),
    "xl": (36, 20, 1280, 3584),
    "xxl": (48, 24, 1536, 4096),
    "1b": (22, 32, 2048, 5632),
    "3b": (24, 32, 3200, 8704),
    "7b": (32, 32, 4096, 11008),
    "xxxl": (48, 40, 2560, 6912)}
LLAMAGEN_HEADS = {(layers, width): heads for layers, heads, width, _ in _LLAMAGEN_SIZES.values()}
"""(layers, width) -> heads, which cannot be read off the shapes of published weights."""

_BART = {
    "kind": "encoder_decoder", "feedforward": "geglu", "feedforward_bias": False,
    "norm": "layernorm", "qk_norm": False, "norm_placement": "normformer", "embedding_norm": True,
    "rotary": "none", "learned_positions": True, "image_positions": "flat"}


def _parti(encoder: int, decoder: int, width: int, heads: int) -> dict[str, Any]:
    return {**_PARTI, "encoder_layers": encoder, "decoder_layers": decoder, "width": width,
            "heads": heads, "head_dim": 64}


def _parti_modern(encoder: int, decoder: int, width: int, heads: int) -> dict[str, Any]:
    return {**_PARTI_MODERN, "encoder_layers": encoder, "decoder_layers": decoder, "width": width,
            "heads": heads, "head_dim": 64, "kv_heads": max(1, heads // 4)}


def _llamagen(layers: int, heads: int, width: int, inner: int) -> dict[str, Any]:
    return {**LLAMAGEN, "layers": layers, "heads": heads, "width": width,
            "head_dim": width // heads, "feedforward_multiplier": inner / width}


PRESETS: dict[str, dict[str, Any]] = {
    "debug": {"kind": "encoder_decoder", "width": 64, "heads": 2, "head_dim": 32,
              "encoder_layers": 1, "decoder_layers": 2},
    "debug-decoder": {"kind": "decoder_only", "width": 64, "heads": 2, "head_dim": 32, "layers": 3},
    "emoji-demo": {"kind": "encoder_decoder", "width": 256, "heads": 4, "head_dim": 64,
                   "encoder_layers": 2, "decoder_layers": 4},
    "small": {"kind": "encoder_decoder", "width": 512, "heads": 8, "head_dim": 64,
              "encoder_layers": 6, "decoder_layers": 12, "dropout": 0.1},
    "small-decoder": {"kind": "decoder_only", "width": 512, "heads": 8, "head_dim": 64,
                      "layers": 20, "dropout": 0.1},

    **{f"parti-{size}": _parti(*shape) for size, shape in _PARTI_SIZES.items()},
    **{f"parti-{size}-modern": _parti_modern(*shape) for size, shape in _PARTI_SIZES.items()},

    "dalle": {**_GPT, "layers": 64, "width": 3968, "heads": 62, "head_dim": 64,
              "attention": _DALLE_ATTENTION, "last_attention": "convolution",
              "convolution_size": 11},
    "rudalle-malevich": {**_GPT, "norm_placement": "sandwich", "attention_bias": True, "layers": 24,
                         "width": 2048, "heads": 16, "head_dim": 128, "dropout": 0.1,
                         "attention": _DALLE_ATTENTION, "last_attention": "convolution"},
    "mindalle": {**_GPT, "text_padding": "masked", "image_positions": "flat",
                 "attention_bias": True, "layers": 42, "width": 1536, "heads": 24,
                 "head_dim": 64},

    "dalle-mini": {**_BART, "encoder_layers": 12, "decoder_layers": 12, "width": 1024, "heads": 16,
                   "head_dim": 64, "feedforward_multiplier": 2730 / 1024},
    "dalle-mega": {**_BART, "encoder_layers": 24, "decoder_layers": 24, "width": 2048, "heads": 32,
                   "head_dim": 64, "feedforward_multiplier": 2.0},

    **{f"llamagen-{size}": _llamagen(*shape) for size, shape in _LLAMAGEN_SIZES.items()},
}
