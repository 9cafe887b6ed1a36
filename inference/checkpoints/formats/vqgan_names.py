"""Names of VQGAN tensors in published checkpoints, and the config that tensors imply.

Our names are those of taming-transformers. Other projects name blocks differently and number the
decoder's levels differently: by resolution like the encoder's (taming), or in the order in which
they run, from the code grid up (LlamaGen, diffusers, transformers' Janus).
"""

# Axes: C channels, L levels, K codebook size, D length of a code vector

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.checkpoints.rules import ConvertedPart, Rule, tensor_names, unchanged
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenloom_common.errors import UserError

Naming = Callable[[str, int], str]
"""(our name outside the quantizer, number of levels) -> the source's name."""

LANDMARK = "encoder.conv_in.weight"  # that every VQGAN with an encoder has
CODEBOOK = "quantize.embedding.weight"  # [K, D], in every project but GumbelVQ
NORM_GROUPS = 32  # in every published VQGAN; only diffusers' config states it
DEFAULT_RESOLUTION = 256  # of the published models, for files that do not state theirs
MAX_LEVELS = 12  # these already halve a side of 2048 pixels down to 1

ATTENTION_MATRIX = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$")
"""Our names of attention matrices: 1x1 convolutions here, linear layers in diffusers."""
_LEVEL = re.compile(r"^(?P<side>encoder\.down|decoder\.up)\.(?P<level>\d+)\."
                    r"(?P<part>block|attn|downsample|upsample)\.(?P<rest>.+)$")

_LLAMAGEN_MID = {"mid.block_1.": "mid.0.", "mid.attn_1.": "mid.1.", "mid.block_2.": "mid.2."}
_DIFFUSERS_PARTS = {"block": "resnets", "attn": "attentions",
                    "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
_DIFFUSERS_PLAIN = {
    "mid.block_1.": "mid_block.resnets.0.", "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "nin_shortcut.": "conv_shortcut.", "norm_out.": "conv_norm_out."}
_DIFFUSERS_ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
                        ".proj_out.": ".to_out.0."}


def taming_name(name: str, levels: int) -> str:
    """The name in taming-transformers: ours."""
    return name


def janus_name(name: str, levels: int) -> str:
    """The name in transformers' JanusVQVAE: taming's, with decoder levels in running order."""
    match = _LEVEL.match(name)
    if match is None or match["side"] == "encoder.down":  # the encoder runs from level 0
        return name
    return f"decoder.up.{_running_order(match, levels)}.{match['part']}.{match['rest']}"


def llamagen_name(name: str, levels: int) -> str:
    """The name in LlamaGen's VQ models (and DeepSeek's Janus)."""
    match = _LEVEL.match(name)
    if match is None:
        return _replaced(name, _LLAMAGEN_MID)
    side = match["side"].split(".")[0]
    part = "res" if match["part"] == "block" else match["part"]
    return f"{side}.conv_blocks.{_running_order(match, levels)}.{part}.{match['rest']}"


def diffusers_name(name: str, levels: int) -> str:
    """The name in diffusers' VQModel since release 0.17."""
    match = _LEVEL.match(name)
    if match is not None:
        down = match["side"] == "encoder.down"
        blocks = "encoder.down_blocks" if down else "decoder.up_blocks"
        part = _DIFFUSERS_PARTS[match["part"]]
        name = f"{blocks}.{_running_order(match, levels)}.{part}.{match['rest']}"
    name = _replaced(name, _DIFFUSERS_PLAIN)
    return _replaced(name, _DIFFUSERS_ATTENTION) if ".attentions." in name else name


def _running_order(match: re.Match[str], levels: int) -> int:
    """Position of a level in running order: the decoder runs from the coarsest, our number L-1."""
    level = int(match["level"])
    return level if match["side"] == "encoder.down" else levels - 1 - level


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


class VQGANShapes:
    """A VQGAN's shape as its tensors imply it."""

    def __init__(self, weights: Mapping[str, Tensor], naming: Naming, levels: int,
                 where: Path) -> None:
        self.weights, self.naming, self.levels, self.where = weights, naming, levels, where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of our tensor `name`. UserError if it is missing or is no matrix or convolution."""
        # Naming is for names outside the quantizer
        source = name if name == CODEBOOK else self.naming(name, self.levels)
        if source not in self.weights:
            raise UserError(f"{self.where}: lacks {source}, so it is not a "
                            "whole VQGAN of this kind")
        shape = tuple(self.weights[source].shape)
        if len(shape) not in (2, 4) or min(shape) < 1:
            raise UserError(f"{self.where}: {source} is of shape {list(shape)}, expected a "
                            "convolution or a matrix")
        return shape

    def has(self, name: str) -> bool:
        """Whether the source has the tensor that we call `name`."""
        return self.naming(name, self.levels) in self.weights

    def count(self, pattern: str) -> int:
        """How many of `pattern` there are with 0, 1, 2, ... filled in."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number

    def code_shape(self) -> tuple[int, int]:
        """[K, D] of the codebook."""
        codes, length = self.shape(CODEBOOK)[:2]
        return codes, length

    def multipliers(self, side: str, channels: int, which: str) -> list[int]:
        """Channels of each level over `channels`, the width of the side's `which` convolution."""
        widths = [self.shape(f"{side}.{level}.block.0.conv1.weight")[0]
                  for level in range(self.levels)]
        if any(width % channels for width in widths):  # our config has whole multipliers only
            raise UserError(f"{self.where}: levels of {widths} channels are no multiples of the "
                            f"{which} convolution's {channels}")
        return [width // channels for width in widths]

    def attention_resolutions(self, side: str, resolution: int) -> list[int]:
        """Resolutions of the levels with attention."""
        # the tensors tell the levels: they are the same for any resolution that is assumed
        return [resolution >> level for level in range(self.levels)
                if self.has(f"{side}.{level}.attn.0.q.weight")]

    def config(self, resolution: int, quantizer: Mapping[str, Any], code_shape: tuple[int, int],
               norm_groups: int = NORM_GROUPS) -> VQGANConfig:
        """The config of a VQGAN with these tensors. quantizer: its settings; code_shape [K, D]."""
        channels, pixels = self.shape("encoder.conv_in.weight")[:2]  # [C, 3, 3, 3]: out, in
        multipliers = self.multipliers("encoder.down", channels, "first")
        blocks = self.count("encoder.down.0.block.{}.conv1.weight")
        # a level of the decoder has one residual block more than one of the encoder
        decoder_blocks = self.count("decoder.up.0.block.{}.conv1.weight") - 1
        decoder_channels = self.shape("decoder.conv_out.weight")[1] // multipliers[0]
        codes, length = code_shape

        values: dict[str, Any] = {
            "resolution": resolution, "in_channels": pixels, "channels": channels,
            "channel_multipliers": multipliers, "num_res_blocks": blocks,
            "attention_resolutions": self.attention_resolutions("encoder.down", resolution),
            "mid_attention": self.has("encoder.mid.attn_1.q.weight"), "norm_groups": norm_groups,
            "z_channels": self.shape("encoder.conv_out.weight")[0], "embed_dim": length,
            "codebook_size": codes, "quantizer": {**quantizer}}
        # None, their default, stands for the encoder's value
        if decoder_channels != channels:
            values["decoder_channels"] = decoder_channels
        if decoder_blocks != blocks:
            values["decoder_res_blocks"] = decoder_blocks
        return VQGANConfig.parse(values, f"{self.where}: the shapes say")


def count_levels(weights: Mapping[str, Tensor], pattern: str, where: Path) -> int:
    """The number of levels (group 1 of `pattern`). UserError unless they are numbered from 0."""
    matches = (re.match(pattern, name) for name in weights)
    digits = [match[1] for match in matches if match]
    # a hostile name with thousands of digits is not turned into a number
    found = {int(number) for number in digits if len(number) < 3}
    has_gap = found != set(range(len(found)))  # a damaged file
    if not found or has_gap or len(found) > MAX_LEVELS:
        raise UserError(f"{where}: its encoder has no levels numbered from 0, so it is not a VQGAN "
                        "of this kind")
    return len(found)


def quantizer_settings(l2_normalize: bool, **more: Any) -> dict[str, Any]:
    """Settings of a published codebook: learned by gradient without restarts, then and now."""
    return {**AS_RELEASED, "l2_normalize": l2_normalize, **more}


def codebook_rules(source: str = CODEBOOK) -> dict[str, Rule]:
    """Rules for our `vq` quantizer: the codebook [K, D] -> [1, K, D], and averages without data."""
    prefix = "quantizer.vq._codebook."
    return {f"{prefix}embed": Rule((source,), add_head_axis),
            f"{prefix}embed_avg": Rule((source,), add_head_axis),
            f"{prefix}cluster_size": Rule((source,), _one_use_each),  # embed_avg / 1 = embed
            f"{prefix}initted": Rule((), _true)}  # else k-means of the first batch would replace it


def add_head_axis(tensor: Tensor) -> Tensor:
    """[...] -> [1, ...]: vector-quantize-pytorch has a codebook per head, and we use one head."""
    return tensor[None]


def _one_use_each(codes: Tensor) -> Tensor:
    return codes.new_ones(1, codes.shape[0])  # [1, K]


def _true() -> Tensor:
    return torch.ones((), dtype=torch.bool)


def vqgan_part(config: VQGANConfig, weights: Mapping[str, Tensor], naming: Naming,
               quantizer: Mapping[str, Rule], where: Path, ignored: tuple[str, ...] = (),
               notes: tuple[str, ...] = ()) -> ConvertedPart:
    """A VQGAN of the source's tensors under other names. quantizer: rules for the quantizer."""
    levels = len(config.channel_multipliers)
    rules: dict[str, Rule] = {}
    for name in tensor_names(VQGAN, config):  # ours: each needs a rule, the source's may be ignored
        if name.startswith("quantizer."):
            rules[name] = quantizer[name]
        else:
            make = _as_convolution if ATTENTION_MATRIX.search(name) else unchanged
            rules[name] = Rule((naming(name, levels),), make)
    return ConvertedPart(VQGAN, config, rules, weights, where, ignored, notes)


def _as_convolution(weight: Tensor) -> Tensor:
    """[C, C] or [C, C, 1, 1] -> [C, C, 1, 1]."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight
