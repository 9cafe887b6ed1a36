"""How published VQGANs name what our VQGAN has, and what a config follows from.

Our names are those of taming-transformers. The others differ in the names of blocks and in the order of the decoder's levels:
by level (taming), or in the order in which they run, from the code grid up (LlamaGen, diffusers, transformers' Janus).
"""

# Axes: C channels, L levels, K codebook size, D length of a code vector

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.rules import ConvertedPart, Rule, only, tensor_names
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenloom_common.errors import UserError

Naming = Callable[[str, int], str]
"""(our name outside the quantizer, number of levels) -> their name."""

CODEBOOK = "quantize.embedding.weight"
NORM_GROUPS = 32  # of every published VQGAN; only diffusers' config says
DEFAULT_RESOLUTION = 256

PROJECTION = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$")
"""Our names of an attention's matrices: 1x1 convolutions here, linear layers in diffusers."""
_LEVEL = re.compile(r"^(?P<side>encoder\.down|decoder\.up)\.(?P<level>\d+)\."
                    r"(?P<part>block|attn|downsample|upsample)\.(?P<rest>.+)$")
_DIFFUSERS_PARTS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
_DIFFUSERS_PLAIN = {"mid.block_1.": "mid_block.resnets.0.", "mid.block_2.": "mid_block.resnets.1.",
                    "mid.attn_1.": "mid_block.attentions.0.", "nin_shortcut.": "conv_shortcut.", "norm_out.": "conv_norm_out."}
_DIFFUSERS_ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}


def taming_name(name: str, levels: int) -> str:
    """taming-transformers' name: ours."""
    return name


def janus_name(name: str, levels: int) -> str:
    """The name in transformers' JanusVQVAE: taming's, but the decoder's levels in the order in which they run."""
    match = _LEVEL.match(name)
    if match is None or match["side"] == "encoder.down":
        return name
    return f"decoder.up.{levels - 1 - int(match['level'])}.{match['part']}.{match['rest']}"


def llamagen_name(name: str, levels: int) -> str:
    """The name in LlamaGen's VQ models (and DeepSeek's Janus)."""
    match = _LEVEL.match(name)
    if match is None:
        for ours, theirs in (("mid.block_1.", "mid.0."), ("mid.attn_1.", "mid.1."), ("mid.block_2.", "mid.2.")):
            name = name.replace(ours, theirs)
        return name
    level = int(match["level"]) if match["side"] == "encoder.down" else levels - 1 - int(match["level"])
    part = "res" if match["part"] == "block" else match["part"]
    return f"{match['side'].split('.')[0]}.conv_blocks.{level}.{part}.{match['rest']}"


def diffusers_name(name: str, levels: int) -> str:
    """The name in diffusers' VQModel, as of the names that its files have since 0.17."""
    match = _LEVEL.match(name)
    if match is not None:
        down = match["side"] == "encoder.down"
        level = int(match["level"]) if down else levels - 1 - int(match["level"])
        blocks = "encoder.down_blocks" if down else "decoder.up_blocks"
        name = f"{blocks}.{level}.{_DIFFUSERS_PARTS[match['part']]}.{match['rest']}"
    for ours, theirs in _DIFFUSERS_PLAIN.items():
        name = name.replace(ours, theirs)
    if ".attentions." in name:
        for ours, theirs in _DIFFUSERS_ATTENTION.items():
            name = name.replace(ours, theirs)
    return name


class Inferred:
    """What the tensors of a VQGAN say about its shape."""

    def __init__(self, weights: Mapping[str, Tensor], naming: Naming, levels: int, where: Path) -> None:
        self.weights, self.naming, self.levels, self.where = weights, naming, levels, where

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that we call `name`. UserError where it is missing or is no matrix."""
        theirs = name if name == CODEBOOK else self.naming(name, self.levels)
        if theirs not in self.weights:
            raise UserError(f"{self.where}: lacks {theirs}, so it is not a whole VQGAN of this kind")
        found = tuple(self.weights[theirs].shape)
        if len(found) not in (2, 4) or min(found) < 1:
            raise UserError(f"{self.where}: {theirs} is of shape {list(found)}, expected a convolution or a matrix")
        return found

    def has(self, name: str) -> bool:
        return self.naming(name, self.levels) in self.weights

    def count(self, pattern: str) -> int:
        """How many of `pattern` with 0, 1, 2, ... in it there are."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number

    def config(self, resolution: int, quantizer: Mapping[str, Any], code_shape: tuple[int, ...],
               norm_groups: int = NORM_GROUPS) -> VQGANConfig:
        """The config of the model that has these tensors. quantizer: its settings; code_shape [K, D]."""
        channels, pixels = self.shape("encoder.conv_in.weight")[:2]
        widths = [self.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(self.levels)]
        if any(width % channels for width in widths):
            raise UserError(f"{self.where}: levels of {widths} channels are no multiples of the first convolution's {channels}")
        multipliers = [width // channels for width in widths]
        attends = [level for level in range(self.levels) if self.has(f"encoder.down.{level}.attn.0.q.weight")]
        blocks = self.count("encoder.down.0.block.{}.conv1.weight")
        decoder_blocks = self.count("decoder.up.0.block.{}.conv1.weight") - 1  # one more than on the way down
        decoder_channels = self.shape("decoder.conv_out.weight")[1] // multipliers[0]
        return VQGANConfig.parse({
            "resolution": resolution, "in_channels": pixels, "channels": channels, "channel_multipliers": multipliers,
            "num_res_blocks": blocks, "attention_resolutions": [resolution >> level for level in attends],
            "mid_attention": self.has("encoder.mid.attn_1.q.weight"), "norm_groups": norm_groups,
            "z_channels": self.shape("encoder.conv_out.weight")[0], "embed_dim": code_shape[1], "codebook_size": code_shape[0],
            "quantizer": {**quantizer},
            **({"decoder_channels": decoder_channels} if decoder_channels != channels else {}),
            **({"decoder_res_blocks": decoder_blocks} if decoder_blocks != blocks else {})}, f"{self.where}: the shapes say")


def count_levels(weights: Mapping[str, Tensor], pattern: str, where: Path) -> int:
    """How many levels there are: one more than the largest number in names that match. UserError for none or too many."""
    found = {int(match[1]) for match in (re.match(pattern, name) for name in weights) if match and len(match[1]) < 3}
    if not found or found != set(range(len(found))) or len(found) > 12:
        raise UserError(f"{where}: its encoder has no levels numbered from 0, so it is not a VQGAN of this kind")
    return len(found)


def quantizer_settings(l2_normalize: bool, **more: Any) -> dict[str, Any]:
    """Published codebooks were learned by gradient, without restarts, and go on so."""
    return {**AS_RELEASED, "l2_normalize": l2_normalize, **more}


def codebook_rules(source: str = CODEBOOK) -> dict[str, Rule]:
    """Their codebook [K, D] as that of our `vq` quantizer, with the moving averages of one that has seen nothing."""
    place = "quantizer.vq._codebook."
    return {f"{place}embed": Rule((source,), lambda codes: codes[None]),
            f"{place}embed_avg": Rule((source,), lambda codes: codes[None]),
            f"{place}cluster_size": Rule((source,), lambda codes: codes.new_ones(1, codes.shape[0])),
            f"{place}initted": Rule((), _true)}


def _true() -> Tensor:
    import torch

    return torch.ones((), dtype=torch.bool)


def vqgan_part(config: VQGANConfig, weights: Mapping[str, Tensor], naming: Naming, quantizer: Mapping[str, Rule], where: Path,
               ignored: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> ConvertedPart:
    """A VQGAN whose tensors are theirs under other names; matrices of linear layers become 1x1 convolutions."""
    levels = len(config.channel_multipliers)
    rules: dict[str, Rule] = {}
    for name in tensor_names(VQGAN, config):
        if name.startswith("quantizer."):
            rules[name] = quantizer[name]
        else:
            rules[name] = Rule((naming(name, levels),), _as_convolution if PROJECTION.search(name) else only)
    return ConvertedPart(VQGAN, config, rules, weights, where, ignored, notes)


def _as_convolution(weight: Tensor) -> Tensor:
    """[C, C] or [C, C, 1, 1] -> [C, C, 1, 1]."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight
