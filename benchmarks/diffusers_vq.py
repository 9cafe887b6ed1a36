"""The peer of the CNN tokenizers: diffusers' `VQModel` with the weights of one of our VQGANs.

The name map is that of diffusers' own converters of taming checkpoints (scripts/convert_vq_diffusion_to_diffusers.py):
our attribute names are taming's, attention projections are 1x1 convolutions here and linear layers there.

Axes: B batch, h w code grid, D length of a code vector, K codebook size, L levels.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer_image import VQGAN, VQGANConfig

PICTURE_TOLERANCE = 2e-4  # float32 rounding through some 40 layers: up to 6e-5 was seen
TIE_TOLERANCE = 1e-4  # two codes whose squared distances differ by less, relative, are a tie

_ATTENTION = {".norm.": ".group_norm.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".proj_out.": ".to_out.0."}
_PLAIN = {"mid.block_1.": "mid_block.resnets.0.", "mid.block_2.": "mid_block.resnets.1.",
          "mid.attn_1.": "mid_block.attentions.0.", "nin_shortcut.": "conv_shortcut.", "norm_out.": "conv_norm_out."}
_PARTS = {"block": "resnets", "attn": "attentions"}


def peer_version() -> str | None:
    """The version of diffusers, or None where it cannot be imported."""
    try:
        import diffusers
        from diffusers import VQModel  # noqa: F401  (a lazy import: this is what may fail)
    except (ImportError, RuntimeError):  # diffusers turns what fails inside its lazy imports into RuntimeError
        return None
    return str(diffusers.__version__)


def diffusers_name(name: str, levels: int) -> str:
    """The name in diffusers of one of our parameters outside the quantizer."""
    def level(match: re.Match[str]) -> str:
        stage, index, part, rest = match["stage"], int(match["level"]), match["part"], match["rest"]
        side = f"encoder.down_blocks.{index}" if stage == "encoder.down" else f"decoder.up_blocks.{levels - 1 - index}"
        return f"{side}.{_PARTS[part]}.{rest}" if part in _PARTS else f"{side}.{part}rs.0.{rest}"

    name = re.sub(r"^(?P<stage>encoder\.down|decoder\.up)\.(?P<level>\d+)\.(?P<part>block|attn|downsample|upsample)\."
                  r"(?P<rest>.+)$", level, name)
    for ours, theirs in _PLAIN.items():
        name = name.replace(ours, theirs)
    if ".attentions." in name:
        for ours, theirs in _ATTENTION.items():
            name = name.replace(ours, theirs)
    return name


def diffusers_state(tokenizer: VQGAN) -> dict[str, Tensor]:
    """All weights of our tokenizer under diffusers' names; the codebook as it is compared (unit length with l2_normalize)."""
    levels = len(tokenizer.config.channel_multipliers)
    state = {"quantize.embedding.weight": tokenizer.codebook.detach().clone()}  # [K, D]
    for name, tensor in tokenizer.state_dict().items():
        if name.startswith("quantizer."):
            continue
        theirs = diffusers_name(name, levels)
        is_projection = ".attentions." in theirs and tensor.ndim == 4
        state[theirs] = tensor[:, :, 0, 0] if is_projection else tensor  # [C, C, 1, 1] -> [C, C]
    return state


def diffusers_config(config: VQGANConfig) -> dict[str, Any]:
    """The arguments of `VQModel` that give the same network."""
    attends = [side in config.attention_resolutions for side in config.level_resolutions]
    return {
        "in_channels": config.in_channels, "out_channels": config.in_channels,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in reversed(attends)),
        "block_out_channels": tuple(config.channels * multiplier for multiplier in config.channel_multipliers),
        "layers_per_block": config.num_res_blocks, "latent_channels": config.z_channels,
        "num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.embed_dim,
        "norm_num_groups": config.norm_groups, "mid_block_add_attention": config.mid_attention,
    }


class Peer:
    """diffusers' VQModel doing what our `encode` and `decode` do, with our weights, on the tokenizer's device and dtype.

    Its codebook stays float32, as ours does: torch has no `cdist` in bfloat16.
    """

    def __init__(self, tokenizer: VQGAN) -> None:
        from diffusers import VQModel

        weight = tokenizer.post_quant_conv.weight
        model: Any = VQModel(**diffusers_config(tokenizer.config))  # its own annotations hide nn.Module
        model.load_state_dict(diffusers_state(tokenizer))
        nn.Module.to(model.eval(), weight.device, weight.dtype)  # diffusers' own `to` warns when a dtype is named
        model.quantize.float()
        model.quantize.embedding.weight.data.copy_(tokenizer.codebook)
        self.model = model
        self.grid, self.dim, self.dtype = tokenizer.grid, tokenizer.config.embed_dim, weight.dtype

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> codes [B, h, w]. `quantize` is the only public way from latents to codes; it also looks
        the codes up and computes a loss, which costs well below 1 % of the encoder."""
        return self.model.quantize(self.model.encode(image).latents.float())[2][2].view(-1, *self.grid)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> image [B, 3, S, S], clamped as ours is."""
        vectors = self.model.quantize.get_codebook_entry(codes, (len(codes), *self.grid, self.dim))  # [B, D, h, w]
        return self.model.decode(vectors.to(self.dtype), force_not_quantize=True).sample.clamp(-1.0, 1.0)


@torch.no_grad()
def verify(ours: VQGAN, peer: Peer, image: Tensor) -> dict[str, Any]:
    """Whether both give the same codes (up to ties) for an image and the same picture for those codes, in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        codes, theirs = ours.encode(image), peer.encode(image)
        difference = float((ours.decode(codes) - peer.decode(codes)).abs().max())
        latents = ours.latents(image).double()  # [B, D, h, w]
    gap = 0.0
    if not torch.equal(codes, theirs):
        mine, other = ((latents - ours.quantizer.lookup(found).double()).square().sum(dim=1) for found in (codes, theirs))
        gap = float(((mine - other).abs() / torch.maximum(mine, other)).max())
    used = codes.unique().numel()
    same = gap <= TIE_TOLERANCE and difference <= PICTURE_TOLERANCE
    return {"codes_equal_share": round(float((codes == theirs).double().mean()), 6), "largest_gap_of_a_tie": gap,
            "codes_used": used, "picture_max_abs_difference": difference, "ok": same and (used > 1 or codes.numel() == 1)}
