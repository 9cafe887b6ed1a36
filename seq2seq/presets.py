"""Sizes by name: everything that does not follow from the tokenizers. Published ones as their papers and code have them.

Parti: Yu et al. 2022, table 1, https://arxiv.org/abs/2206.10789. DALL-E: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092.
LlamaGen: Sun et al. 2024, table 1, https://arxiv.org/abs/2406.06525. ruDALL-E, minDALL-E and DALL-E mini: their public code.
"""

from __future__ import annotations

from typing import Any

_PARTI = {"kind": "encoder_decoder", "feedforward": "gelu", "feedforward_multiplier": 4.0, "feedforward_bias": False,
          "norm": "layernorm", "qk_norm": False, "attention": ("convolution",), "dropout": 0.1,
          "rotary": "2d", "learned_positions": False}  # the paper does not say how positions are told; these have no parameters
_MODERN = {"kind": "encoder_decoder", "feedforward": "swiglu", "feedforward_multiplier": 8 / 3, "feedforward_bias": False,
           "norm": "rmsnorm", "qk_norm": True, "rotary": "2d", "learned_positions": False}
_PARTI_SIZES = {  # encoder layers, decoder layers, width, heads of 64
    "350m": (12, 12, 1024, 16), "750m": (12, 36, 1024, 16), "3b": (12, 36, 2048, 32), "20b": (16, 64, 4096, 64)}

_GPT = {"kind": "decoder_only", "feedforward": "gelu", "feedforward_multiplier": 4.0, "norm": "layernorm", "qk_norm": False,
        "rotary": "none", "learned_positions": True, "begin_of_image": False, "predict_text": True, "text_padding": "learned"}
_DALLE_ATTENTION = ("row", "column", "row", "row")  # column where (layer - 2) % 4 = 0, the first layer being 1

LLAMAGEN: dict[str, Any] = {
    "kind": "decoder_only", "feedforward": "swiglu", "feedforward_bias": False, "norm": "rmsnorm", "norm_eps": 1e-5,
    "qk_norm": False, "rotary": "2d", "learned_positions": False, "begin_of_image": False, "text_positions": "blind",
    "text_projection": "mlp", "dropout": 0.1}
"""What its sizes have in common."""
_LLAMAGEN_SIZES = {  # layers, heads, width, inner width of the feed-forward
    "b": (12, 12, 768, 2048), "l": (24, 16, 1024, 2816), "xl": (36, 20, 1280, 3584), "xxl": (48, 24, 1536, 4096),
    "1b": (22, 32, 2048, 5632), "3b": (24, 32, 3200, 8704), "7b": (32, 32, 4096, 11008), "xxxl": (48, 40, 2560, 6912)}
LLAMAGEN_HEADS = {(layers, width): heads for layers, heads, width, _ in _LLAMAGEN_SIZES.values()}
"""(layers, width) -> heads, which the shapes of weights do not say."""

_BART = {"kind": "encoder_decoder", "feedforward": "geglu", "feedforward_bias": False, "norm": "layernorm", "qk_norm": False,
         "norm_placement": "normformer", "embedding_norm": True, "rotary": "none", "learned_positions": True,
         "image_positions": "flat"}


def _parti(base: dict[str, Any], encoder: int, decoder: int, width: int, heads: int) -> dict[str, Any]:
    return {**base, "encoder_layers": encoder, "decoder_layers": decoder, "width": width, "heads": heads, "head_dim": 64,
            **({"kv_heads": max(1, heads // 4)} if base is _MODERN else {})}


def _llamagen(layers: int, heads: int, width: int, inner: int) -> dict[str, Any]:
    return {**LLAMAGEN, "layers": layers, "heads": heads, "width": width, "head_dim": width // heads,
            "feedforward_multiplier": inner / width}


PRESETS: dict[str, dict[str, Any]] = {
    "debug": {"kind": "encoder_decoder", "width": 64, "heads": 2, "head_dim": 32, "encoder_layers": 1, "decoder_layers": 2},
    "debug-decoder": {"kind": "decoder_only", "width": 64, "heads": 2, "head_dim": 32, "layers": 3},
    "emoji-demo": {"kind": "encoder_decoder", "width": 256, "heads": 4, "head_dim": 64, "encoder_layers": 2,
                   "decoder_layers": 4},
    "small": {"kind": "encoder_decoder", "width": 512, "heads": 8, "head_dim": 64, "encoder_layers": 6, "decoder_layers": 12,
              "dropout": 0.1},
    "small-decoder": {"kind": "decoder_only", "width": 512, "heads": 8, "head_dim": 64, "layers": 20, "dropout": 0.1},
    **{f"parti-{size}": _parti(_PARTI, *shape) for size, shape in _PARTI_SIZES.items()},
    **{f"parti-{size}-modern": _parti(_MODERN, *shape) for size, shape in _PARTI_SIZES.items()},
    "dalle": {**_GPT, "layers": 64, "width": 3968, "heads": 62, "head_dim": 64, "attention": _DALLE_ATTENTION,
              "last_attention": "convolution", "convolution_size": 11},
    "rudalle-malevich": {**_GPT, "norm_placement": "sandwich", "attention_bias": True, "layers": 24, "width": 2048, "heads": 16,
                         "head_dim": 128, "dropout": 0.1, "attention": _DALLE_ATTENTION, "last_attention": "convolution"},
    "mindalle": {**_GPT, "text_padding": "masked", "image_positions": "flat", "attention_bias": True, "layers": 42,
                 "width": 1536, "heads": 24, "head_dim": 64},
    "dalle-mini": {**_BART, "encoder_layers": 12, "decoder_layers": 12, "width": 1024, "heads": 16, "head_dim": 64,
                   "feedforward_multiplier": 2730 / 1024},
    "dalle-mega": {**_BART, "encoder_layers": 24, "decoder_layers": 24, "width": 2048, "heads": 32, "head_dim": 64,
                   "feedforward_multiplier": 2.0},
    **{f"llamagen-{size}": _llamagen(*shape) for size, shape in _LLAMAGEN_SIZES.items()},
}
