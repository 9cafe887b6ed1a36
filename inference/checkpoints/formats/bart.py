"""DALL-E mini's transformer (Dayma et al. 2021): BART with NormFormer's norms and a GLU.

dalle-mini publishes it in Flax, min-dalle in PyTorch. Both converters bring their tensors under
min-dalle's names (`encoder.layers.0.glu.fc0.weight`); from there this module makes our
encoder-decoder.
"""

# Axes: D width, I inner width of the feed-forward, K codebook size, N image tokens, T text ids

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.checkpoints.rules import ConvertedPart, Rule, multiplier, tensor_names
from seq2seq import PRESETS, EncoderDecoder, Seq2SeqConfig
from tokenloom_common.errors import UserError

HEAD_DIM = 64  # of both published sizes
_SIZE_FIELDS = ("kind", "encoder_layers", "decoder_layers", "width", "heads", "head_dim",
                "feedforward_multiplier")
# all else (activation, norms, positions) is the same in mini and mega
_ARCHITECTURE = {name: value for name, value in PRESETS["dalle-mini"].items()
                 if name not in _SIZE_FIELDS}

_NORM = re.compile(r"(^|[._])(norm|layer_norm|layernorm_embedding|ln0|ln1|final_ln)"
                   r"\.(weight|bias)$")
_OUTSIDE_LAYERS = {
    "text_encoder.text_input.embedding.weight": "encoder.embed_tokens.weight",
    "text_encoder.text_input.position": "encoder.embed_positions.weight",
    "text_encoder.embedding_norm.weight": "encoder.layernorm_embedding.weight",
    "text_encoder.embedding_norm.bias": "encoder.layernorm_embedding.bias",
    "text_encoder.layers.final_norm.weight": "encoder.final_ln.weight",
    "text_encoder.layers.final_norm.bias": "encoder.final_ln.bias",
    "position": "decoder.embed_positions.weight",
    "embedding_norm.weight": "decoder.layernorm_embedding.weight",
    "embedding_norm.bias": "decoder.layernorm_embedding.bias",
    "decoder.final_norm.weight": "decoder.final_ln.weight",
    "decoder.final_norm.bias": "decoder.final_ln.bias"}
"""Our names -> min-dalle's."""
_BLOCKS = {"encoder": ("self_attn", "glu"), "decoder": ("self_attn", "encoder_attn", "glu")}
"""The blocks of a BART layer; x-transformers counts each of them as a layer of its own."""
_LAYER = re.compile(r"(?:text_encoder\.layers|(decoder))\.layers\.(\d+)\.(.+)")
_PROJECTIONS = {f"1.to_{name}.weight": f"{name}_proj.weight" for name in ("q", "k", "v", "out")}
_PRE_NORM = "0.0."  # x-transformers' place of the norm before a block


@dataclass(frozen=True)
class BartSource:
    """Tensors under min-dalle's names, and facts that they do not tell.

    begin: row of the image embeddings that an image begins with. heads: None if the file does not
    state them.
    """

    weights: Mapping[str, Tensor]
    where: Path
    codebook_size: int
    begin: int
    heads: int | None = None

    def size(self, name: str, axis: int) -> int:
        """Length of a matrix along `axis`. UserError if it is missing or is no matrix."""
        if name not in self.weights:
            raise UserError(f"{self.where}: lacks {name}, so it is not a (whole) DALL-E mini")
        shape = self.weights[name].shape
        if len(shape) != 2 or min(shape) < 1:
            raise UserError(f"{self.where}: {name} is of shape {list(shape)}, expected a matrix")
        return shape[axis]

    def layers(self, side: str) -> int:
        """Number of layers of `encoder` or `decoder`. UserError unless numbered from 0."""
        # {1,4}: a hostile name with thousands of digits is not turned into a number
        matches = [re.match(rf"{side}\.layers\.(\d{{1,4}})\.", name) for name in self.weights]
        found = {int(match[1]) for match in matches if match}
        if not found or found != set(range(len(found))):
            raise UserError(f"{self.where}: its {side} has no layers numbered from 0, so it is not "
                            "a (whole) DALL-E mini")
        return len(found)

    def inner_width(self, layer: str) -> int:
        """Inner width of the feed-forward in a layer, "encoder.layers.0" for example."""
        return self.size(f"{layer}.glu.fc0.weight", 0)

    def config(self) -> Seq2SeqConfig:
        """The config of the model that has these tensors."""
        text_vocab_size = self.size("encoder.embed_tokens.weight", 0)
        width = self.size("encoder.embed_tokens.weight", 1)
        text_length = self.size("encoder.embed_positions.weight", 0)
        # an encoder and a decoder of other widths fail the comparison of shapes that follows
        inner = self.inner_width("encoder.layers.0")
        image_tokens = self.size("decoder.embed_positions.weight", 0)
        heads = self._head_count(width)
        side = math.isqrt(image_tokens)  # its shape is not stated: a square
        if side * side != image_tokens:
            raise UserError(f"{self.where}: {image_tokens} image tokens are no square grid")
        return Seq2SeqConfig.parse({
            **_ARCHITECTURE, "norm_bias": True,
            "text_vocab_size": text_vocab_size, "text_length": text_length,
            "codebook_size": self.codebook_size, "grid": (side, side),
            "width": width, "heads": heads, "head_dim": width // heads,
            "encoder_layers": self.layers("encoder"), "decoder_layers": self.layers("decoder"),
            "feedforward_multiplier": multiplier(inner, width)}, f"{self.where}: the shapes say")

    def _head_count(self, width: int) -> int:
        # a stated number of heads divides the width; unstated ones are 64 wide
        divisor = self.heads or HEAD_DIM
        if width % divisor:
            stated = self.heads or f"heads of {HEAD_DIM}"
            raise UserError(f"{self.where}: width {width} is not that of {stated}; give their "
                            "number in a JSON file as --config FILE")
        return self.heads or width // HEAD_DIM


def bart_part(source: BartSource) -> ConvertedPart:
    """Our encoder-decoder of a DALL-E mini. Norm scales and biases that it lacks are 1 and 0."""
    config = source.config()
    rules = {name: _rule(name, source, config) for name in tensor_names(EncoderDecoder, config)}

    left_out = [name for name, rule in rules.items() if not rule.sources]
    scales = sum(name.endswith("weight") for name in left_out)
    notes = []
    for count, kind, value in ((scales, "scales", 1), (len(left_out) - scales, "biases", 0)):
        if count:
            notes.append(f"{count} {kind} of norms are not in the file and are {value}: Flax keeps "
                         "no untrained ones")
    return ConvertedPart(EncoderDecoder, config, rules, source.weights, source.where,
                         notes=tuple(notes))


def _rule(name: str, source: BartSource, config: Seq2SeqConfig) -> Rule:
    """The rule for our tensor `name`."""
    if name == "begin_of_image":
        # a row of the image embeddings there, a vector of its own here
        return Rule(("decoder.embed_tokens.weight",), partial(_row, number=source.begin))
    # the source's image vocabulary has rows beyond the codes, the begin slot among them
    codes_only = partial(_first_rows, count=config.codebook_size)
    if name == "image_embedding.weight":
        return Rule(("decoder.embed_tokens.weight",), codes_only)
    if name == "to_logits.weight":
        return Rule(("decoder.lm_head.weight",), codes_only)
    if name in _OUTSIDE_LAYERS:
        return _tensor_or_untrained_norm(_OUTSIDE_LAYERS[name], source, config.width)

    match = _LAYER.fullmatch(name)
    assert match is not None, name
    side, rest = match[1] or "encoder", match[3]
    number, block = divmod(int(match[2]), len(_BLOCKS[side]))
    layer = f"{side}.layers.{number}"
    if _BLOCKS[side][block] == "glu":
        return _feedforward_rule(rest, layer, source, config)
    return _attention_rule(rest, f"{layer}.", _BLOCKS[side][block], source, config)


def _attention_rule(rest: str, prefix: str, block: str, source: BartSource, config: Seq2SeqConfig
                    ) -> Rule:
    if rest in _PROJECTIONS:
        name = f"{prefix}{block}.{_PROJECTIONS[rest]}"
    else:
        # NormFormer has a norm before attention and another after it
        before = "pre_" if rest.startswith(_PRE_NORM) else ""
        name = f"{prefix}{before}{block}_layer_norm.{_leaf(rest)}"
    return _tensor_or_untrained_norm(name, source, config.width)


def _feedforward_rule(rest: str, layer: str, source: BartSource, config: Seq2SeqConfig) -> Rule:
    glu = f"{layer}.glu"
    if rest == "1.ff.0.proj.weight":  # our GELU takes the second half, min-dalle's fc0
        return Rule((f"{glu}.fc1.weight", f"{glu}.fc0.weight"), _stacked)
    if rest == "1.ff.3.weight":
        return Rule((f"{glu}.fc2.weight",))
    if rest.startswith(_PRE_NORM):
        return _tensor_or_untrained_norm(f"{glu}.ln0.{_leaf(rest)}", source, config.width)
    return _tensor_or_untrained_norm(f"{glu}.ln1.{_leaf(rest)}", source, source.inner_width(layer))


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[1]


def _tensor_or_untrained_norm(name: str, source: BartSource, length: int) -> Rule:
    """The source's tensor; ones or zeros for a norm without one (Flax's use_scale=False)."""
    if name in source.weights or not _NORM.search(name):
        return Rule((name,))  # ConvertedPart.check lists it if it is missing
    side = name.split(".")[0]
    # in the file's own precision, so that the folder holds one dtype
    dtype = source.weights[f"{side}.embed_tokens.weight"].dtype
    make = torch.ones if name.endswith("weight") else torch.zeros
    return Rule((), partial(make, length, dtype=dtype))


def _row(matrix: Tensor, number: int) -> Tensor:
    return matrix[number]


def _first_rows(matrix: Tensor, count: int) -> Tensor:
    return matrix[:count]


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)  # [2 I, D]


def check_sizes(source: BartSource) -> None:
    """UserError if the image vocabulary is too small for the codes and the begin slot."""
    rows = source.size("decoder.embed_tokens.weight", 0)
    if rows < source.codebook_size or rows <= source.begin or source.codebook_size < 2:
        raise UserError(f"{source.where}: {rows} image embeddings, which are too few for "
                        f"{source.codebook_size} codes and a beginning at {source.begin}")


def head_count(values: Mapping[str, Any], name: str, where: Path) -> int | None:
    """The number of heads that a config states as `name`; None if it states none."""
    found = values.get(name)
    # type(): True is an int to isinstance
    if found is not None and (type(found) is not int or not 1 <= found <= 1024):
        raise UserError(f"{where}: {name} {found!r}: expected a number of heads, 1 to 1024")
    return found
