"""Blocks of the CNN tokenizers.

Attribute names are those of the released VQGAN state dicts, so that these load.

Axes: B batch, C channels, H W pixels or positions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer_image.config import VQGANConfig

NORM_EPS = 1e-6
"""GroupNorm's epsilon in the released models (PyTorch's default is 1e-5)."""


class Checkpointed(nn.Module):
    """A stack of blocks that can recompute the activations inside each block for the gradient."""

    checkpointing = False

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return `block(hidden)`, with its activations kept or recomputed."""
        # without gradients no activation is kept anyway
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, hidden, use_reentrant=False)
        return block(hidden)


def group_norm(channels: int, groups: int, eps: float = NORM_EPS) -> nn.GroupNorm:
    """Build a GroupNorm with the released models' epsilon unless another is given."""
    return nn.GroupNorm(groups, channels, eps=eps)


class ResBlock(nn.Module):
    """Twice norm, swish, 3x3 convolution; a 1x1 convolution on the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float,
                 eps: float = NORM_EPS) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        out = self.conv1(F.silu(self.norm1(hidden)))
        out = self.conv2(self.dropout(F.silu(self.norm2(out))))
        if hasattr(self, "nin_shortcut"):
            hidden = self.nin_shortcut(hidden)
        return out + hidden


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, projections as 1x1 convolutions, scale C^-0.5."""

    def __init__(self, channels: int, groups: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        normed = self.norm(hidden)
        query = rearrange(self.q(normed), "b c h w -> b 1 (h w) c")
        key = rearrange(self.k(normed), "b c h w -> b 1 (h w) c")
        value = rearrange(self.v(normed), "b c h w -> b 1 (h w) c")
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, 1, H*W, C]
        mixed = rearrange(mixed, "b 1 (h w) c -> b c h w", h=hidden.shape[2])
        return hidden + self.proj_out(mixed)


class Downsample(nn.Module):
    """Stride-2 convolution, padded right and below only as in the released models."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))  # left, right, top, bottom


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Level(Checkpointed):
    """Residual blocks of one resolution, each followed by attention if the config says so."""

    def __init__(self, widths: list[int], attend: bool, config: VQGANConfig,
                 downsample: Downsample | None = None, upsample: Upsample | None = None) -> None:
        """`widths`: channels of the input and after each block."""
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.block = nn.ModuleList(
            ResBlock(before, after, groups, config.dropout, eps)
            for before, after in pairwise(widths))
        attended_widths = widths[1:] if attend else []  # an empty list adds no tensors
        self.attn = nn.ModuleList(AttentionBlock(width, groups, eps) for width in attended_widths)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W], or half or twice the size if the level resamples."""
        for index, block in enumerate(self.block):
            hidden = self.run(block, hidden)
            if self.attn:
                hidden = self.run(self.attn[index], hidden)
        if self.downsample is not None:
            hidden = self.downsample(hidden)
        if self.upsample is not None:
            hidden = self.upsample(hidden)
        return hidden


class Middle(Checkpointed):
    """Block, attention, block at the resolution of the code grid."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        groups, eps = config.norm_groups, config.norm_eps
        self.block_1 = ResBlock(channels, channels, groups, config.dropout, eps)
        if config.mid_attention:
            self.attn_1 = AttentionBlock(channels, groups, eps)
        self.block_2 = ResBlock(channels, channels, groups, config.dropout, eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        hidden = self.run(self.block_1, hidden)
        if hasattr(self, "attn_1"):
            hidden = self.run(self.attn_1, hidden)
        return self.run(self.block_2, hidden)


class Encoder(nn.Module):
    """Image -> feature map at the resolution of the code grid."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        width = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)

        self.down = nn.ModuleList()
        last = len(config.channel_multipliers) - 1
        for index, multiplier in enumerate(config.channel_multipliers):
            out = config.channels * multiplier
            widths = [width] + [out] * config.num_res_blocks
            attend = config.level_resolutions[index] in config.attention_resolutions
            downsample = Downsample(out) if index != last else None
            self.down.append(Level(widths, attend, config, downsample=downsample))
            width = out

        self.mid = Middle(width, config)
        self.norm_out = group_norm(width, config.norm_groups, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> features [B, z_channels, h, w]."""
        hidden = self.conv_in(image)
        for level in self.down:
            hidden = level(hidden)
        hidden = self.mid(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Feature map at the resolution of the code grid -> image."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.decoder_channels or config.channels
        blocks = config.decoder_res_blocks or config.num_res_blocks
        width = channels * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width, config)

        levels: list[Level] = []
        for index in reversed(range(len(config.channel_multipliers))):
            out = channels * config.channel_multipliers[index]
            widths = [width] + [out] * (blocks + 1)  # one block more than in the encoder
            attend = config.level_resolutions[index] in config.attention_resolutions
            upsample = Upsample(out) if index != 0 else None
            levels.append(Level(widths, attend, config, upsample=upsample))
            width = out
        # stored by level as in released state dicts: up[0] has the full resolution and runs last
        self.up = nn.ModuleList(reversed(levels))

        self.norm_out = group_norm(width, config.norm_groups, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, z_channels, h, w] -> image [B, 3, H, W], unclamped."""
        hidden = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))
