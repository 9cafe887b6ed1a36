"""The transformer of DALL-E mini and mega (Dayma et al. 2021): BART with normformer's norms and a gated feed-forward.

Two projects publish it: dalle-mini in Flax, min-dalle in PyTorch. Both converters bring their tensors under min-dalle's names,
`encoder.layers.0.glu.fc0.weight`, and what is here makes our encoder-decoder of them.
"""

# Axes: D width, I inner width of the feed-forward, K codebook size, N image tokens, T text ids

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
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
_SHAPE = {name: value for name, value in PRESETS["dalle-mini"].items()
          if name not in ("kind", "encoder_layers", "decoder_layers", "width", "heads", "head_dim", "feedforward_multiplier")}
_NORMS = re.compile(r"(^|[._])(norm|layer_norm|layernorm_embedding|ln0|ln1|final_ln)\.(weight|bias)$")
_ENDS = {
    "text_encoder.text_input.embedding.weight": "encoder.embed_tokens.weight",
    "text_encoder.text_input.position": "encoder.embed_positions.weight", "position": "decoder.embed_positions.weight",
    **{f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias") for ours, theirs in (
        ("text_encoder.embedding_norm", "encoder.layernorm_embedding"), ("text_encoder.layers.final_norm", "encoder.final_ln"),
        ("embedding_norm", "decoder.layernorm_embedding"), ("decoder.final_norm", "decoder.final_ln"))}}
_BLOCKS = {"encoder": ("self_attn", "glu"), "decoder": ("self_attn", "encoder_attn", "glu")}
_BLOCK = re.compile(r"(?:text_encoder\.layers|(decoder))\.layers\.(\d+)\.(.+)")
_PROJECTIONS = {f"1.to_{name}.weight": f"{name}_proj.weight" for name in ("q", "k", "v", "out")}


@dataclass(frozen=True)
class BartSource:
    """Tensors under min-dalle's names, and what they do not say.

    begin: row of the image embeddings that a picture begins with. heads: None where the file does not say.
    """

    weights: Mapping[str, Tensor]
    where: Path
    codebook_size: int
    begin: int
    heads: int | None = None

    def size(self, name: str, axis: int) -> int:
        """A side of a matrix. UserError where it is missing or is no matrix."""
        if name not in self.weights:
            raise UserError(f"{self.where}: lacks {name}, so it is not a (whole) DALL-E mini")
        shape = self.weights[name].shape
        if len(shape) != 2 or min(shape) < 1:
            raise UserError(f"{self.where}: {name} is of shape {list(shape)}, expected a matrix")
        return shape[axis]

    def layers(self, side: str) -> int:
        """How many layers `encoder` or `decoder` has. UserError unless they are numbered from 0."""
        matches = [re.match(rf"{side}\.layers\.(\d{{1,4}})\.", name) for name in self.weights]
        found = {int(match[1]) for match in matches if match}
        if not found or found != set(range(len(found))):
            raise UserError(f"{self.where}: its {side} has no layers numbered from 0, so it is not a (whole) DALL-E mini")
        return len(found)

    def config(self) -> Seq2SeqConfig:
        """The config of the model that has these tensors."""
        width = self.size("encoder.embed_tokens.weight", 1)
        inner, tokens = self.size("encoder.layers.0.glu.fc0.weight", 0), self.size("decoder.embed_positions.weight", 0)
        heads = self.heads or (width // HEAD_DIM if width % HEAD_DIM == 0 else width + 1)
        if width % heads:
            raise UserError(f"{self.where}: width {width} is not that of {self.heads or 'heads of 64'}; give their number "
                            "in a JSON file as --config FILE")
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise UserError(f"{self.where}: {tokens} image tokens are no square grid")
        return Seq2SeqConfig.parse({
            **_SHAPE, "norm_bias": True, "text_vocab_size": self.size("encoder.embed_tokens.weight", 0),
            "text_length": self.size("encoder.embed_positions.weight", 0), "codebook_size": self.codebook_size,
            "grid": (side, side), "width": width, "heads": heads, "head_dim": width // heads,
            "encoder_layers": self.layers("encoder"), "decoder_layers": self.layers("decoder"),
            "feedforward_multiplier": multiplier(inner, width)}, f"{self.where}: the shapes say")


def bart_part(source: BartSource, notes: tuple[str, ...] = ()) -> ConvertedPart:
    """Our encoder-decoder of a DALL-E mini. Norms whose scale or bias is not in the file have 1 or 0 there."""
    config = source.config()
    left_out: list[str] = []
    rules = {name: _rule(name, source, config, left_out) for name in tensor_names(EncoderDecoder, config)}
    for kind, value in (("scales", 1), ("biases", 0)):
        count = sum(name.endswith("weight") == (value == 1) for name in left_out)
        if count:
            notes = (*notes, f"{count} {kind} of norms are not in the file and are {value}: Flax keeps no untrained ones")
    return ConvertedPart(EncoderDecoder, config, rules, source.weights, source.where, notes=notes)


def _rule(name: str, source: BartSource, config: Seq2SeqConfig, left_out: list[str]) -> Rule:
    if name == "begin_of_image":
        return Rule(("decoder.embed_tokens.weight",), partial(_row, number=source.begin))
    if name in ("image_embedding.weight", "to_logits.weight"):
        theirs = "embed_tokens" if name == "image_embedding.weight" else "lm_head"
        return Rule((f"decoder.{theirs}.weight",), partial(_rows, count=config.codebook_size))
    if name in _ENDS:
        return _one(_ENDS[name], source, config.width, left_out)
    match = _BLOCK.fullmatch(name)
    assert match is not None, name
    side, number, rest = match[1] or "encoder", int(match[2]), match[3]
    layer, block = divmod(number, len(_BLOCKS[side]))
    part, place = _BLOCKS[side][block], f"{side}.layers.{layer}"
    if part != "glu":
        theirs = f"{place}.{part}.{_PROJECTIONS[rest]}" if rest in _PROJECTIONS else (
            f"{place}.pre_{part}_layer_norm{rest[3:]}" if rest.startswith("0.0.") else f"{place}.{part}_layer_norm{rest[3:]}")
        return _one(theirs, source, config.width, left_out)
    if rest == "1.ff.0.proj.weight":  # the second half of ours goes through the GELU, as their fc0
        return Rule((f"{place}.glu.fc1.weight", f"{place}.glu.fc0.weight"), _stacked)
    if rest == "1.ff.3.weight":
        return Rule((f"{place}.glu.fc2.weight",))
    norm, inner = ("ln0", config.width) if rest.startswith("0.0.") else ("ln1", source.size(f"{place}.glu.fc0.weight", 0))
    return _one(f"{place}.glu.{norm}.{rest.rsplit('.', 1)[1]}", source, inner, left_out)


def _one(theirs: str, source: BartSource, length: int, left_out: list[str]) -> Rule:
    """Their tensor; what a norm without it does."""
    if theirs in source.weights or not _NORMS.search(theirs):
        return Rule((theirs,))
    left_out.append(theirs)
    dtype = source.weights[f"{theirs.split('.')[0]}.embed_tokens.weight"].dtype
    make: Callable[..., Tensor] = torch.ones if theirs.endswith("weight") else torch.zeros
    return Rule((), partial(make, length, dtype=dtype))


def _row(matrix: Tensor, number: int) -> Tensor:
    return matrix[number]


def _rows(matrix: Tensor, count: int) -> Tensor:
    return matrix[:count]


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def check_sizes(source: BartSource) -> None:
    """UserError where the image vocabulary is too small for the codes and the begin slot."""
    rows = source.size("decoder.embed_tokens.weight", 0)
    if not source.codebook_size <= rows or not source.begin < rows or source.codebook_size < 2:
        raise UserError(f"{source.where}: {rows} image embeddings, which are too few for {source.codebook_size} codes and a "
                        f"beginning at {source.begin}")


def head_count(values: Mapping[str, Any], name: str, where: Path | None) -> int | None:
    """The number of heads that a config names; None where it names none."""
    found = values.get(name)
    if found is not None and (type(found) is not int or not 1 <= found <= 1024):
        raise UserError(f"{where}: {name} {found!r}: expected a number of heads, 1 to 1024")
    return found
