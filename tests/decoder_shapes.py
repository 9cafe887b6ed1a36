"""Small models of every shape that the serving decoder knows, and their logits step by step."""

from __future__ import annotations

import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import MatmulStrategy
from seq2seq import TextBatch
from tests import tiny

ENCODER_DECODERS = {
    "default": {},
    "grouped-query": {"kv_heads": 1},
    "rotary-1d": {"rotary": "1d"},
    "learned-only": {"rotary": "none"},
    "rotary-only": {"learned_positions": False},
    "gelu-layernorm": {"feedforward": "gelu", "norm": "layernorm", "qk_norm": False,
                       "feedforward_multiplier": 4.0},
    "one-head": {"heads": 1, "head_dim": 32},
    "wide-grid": {"grid": (2, 5)},
    "convolution": {"attention": ("convolution",), "convolution_size": 3},
    "normformer": {"norm_placement": "normformer", "norm": "layernorm", "embedding_norm": True,
                   "image_positions": "flat", "rotary": "none", "feedforward": "geglu",
                   "feedforward_bias": False},
    "bart-norms": {"norm_placement": "normformer", "norm": "layernorm", "norm_bias": True,
                   "norm_eps": 3e-3, "embedding_norm": True, "feedforward": "geglu", "kv_heads": 1},
    "layout": {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3)},
    "features": {"text_vocab_size": None, "text_feature_width": 6, "encoder_layers": 0},
}
DECODERS_ONLY = {
    "default": {},
    "dalle": {"predict_text": True, "text_padding": "learned", "begin_of_image": False,
              "rotary": "none", "attention": ("row", "column", "row"),
              "last_attention": "convolution", "convolution_size": 3},
    "dalle-masked": {"predict_text": True, "begin_of_image": False, "rotary": "none",
                     "attention_bias": True},
    "llamagen": {"text_positions": "blind", "begin_of_image": False, "learned_positions": False,
                 "qk_norm": False, "feedforward_bias": False, "text_projection": "mlp",
                 "text_vocab_size": None, "text_feature_width": 6,
                 # beside a mean square of about 0.01, so that an ignored epsilon shows
                 "norm_eps": 3e-3},
    "sandwich": {"norm_placement": "sandwich", "norm": "layernorm", "rotary": "1d"},
    "biased-norms": {"norm_placement": "sandwich", "norm": "layernorm", "norm_bias": True,
                     "qk_norm": False},
    "grouped-query-column": {"kv_heads": 1, "attention": ("column",), "grid": (3, 5)},
    "layout": {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3),
               "attention": ("row", "full")},
    "one-slot": {"text_vocab_size": 7, "text_length": 1},
}
SHAPES = {}
for name, changes in ENCODER_DECODERS.items():
    SHAPES[f"encoder-decoder {name}"] = (tiny.seq2seq, changes)
for name, changes in DECODERS_ONLY.items():
    SHAPES[f"decoder-only {name}"] = (tiny.decoder_only, changes)
STRATEGIES = {"torch": MatmulStrategy(), "native": MatmulStrategy(native_to=64)}


def build(shape: str):
    """A model, four captions of different lengths, and layouts (None if the model has none)."""
    family, changes = SHAPES[shape]
    model = family(**changes)
    config = model.config
    generator = torch.Generator().manual_seed(1)

    length = config.text_length
    lengths = torch.tensor([length, max(1, length // 2), 1, min(2, length)])
    mask = torch.arange(length) < lengths[:, None]  # [4, T]
    if config.text_feature_width:
        text_input = torch.randn(4, length, config.text_feature_width, generator=generator)
    else:
        text_input = torch.randint(4, config.text_vocab_size, (4, length), generator=generator)

    layout = None
    if config.layout_grid:
        size = (4, config.layout_tokens)
        layout = torch.randint(0, config.layout_classes, size, generator=generator)
    return model, TextBatch(text_input, mask), layout


def tokens(model, rows: int, seed: int = 0) -> torch.Tensor:
    """Random image tokens [rows, N]."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.codebook_size, (rows, config.num_tokens), generator=generator)


def caption(text: TextBatch, rows: slice) -> TextBatch:
    """Some of the captions."""
    return TextBatch(text.text_input[rows], text.text_mask[rows])


def left_padded(text: TextBatch) -> TextBatch:
    """The same captions with their padding in front."""
    inputs, masks = [], []
    for text_input, mask in zip(*text, strict=True):
        padding = int((~mask).sum())
        inputs.append(text_input.roll(padding, dims=0))
        masks.append(mask.roll(padding, dims=0))
    return TextBatch(torch.stack(inputs), torch.stack(masks))


def cached_logits(model, text, image_tokens, images: int = 1, layout=None,
                  strategy: str = "torch") -> torch.Tensor:
    """Logits [R, s, K] of a new decoder over given tokens [R, s]."""
    decoder = CachedDecoder(model, matmul=STRATEGIES[strategy])
    return cached_with(decoder, text, image_tokens, layout, images)


def cached_with(decoder, text, image_tokens, layout=None, images: int = 1) -> torch.Tensor:
    """Logits [R, s, K] of a decoder over given tokens [R, s], one step at a time."""
    groups, cache = prefilled(decoder, text, layout, images)
    steps = []
    previous = None
    for position in range(image_tokens.shape[1]):
        steps.append(decoder.decode_one(previous, position, groups, cache))
        previous = image_tokens[:, position]
    return torch.stack(steps, dim=1)


def prefilled(decoder, text, layout, images: int = 1):
    """Caption memories, and a cache with the layout in it."""
    groups = [decoder.prefill(text, images)]
    cache = decoder.new_cache(groups)
    if layout is not None:
        decoder.decode_layout(layout, 0, groups, cache)
    return groups, cache
