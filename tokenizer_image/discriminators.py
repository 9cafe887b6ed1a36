"""Networks that tell pictures from reconstructions, for the adversarial term of a tokenizer.

All run in float32, also under autocast: R1 differentiates them twice, and their gradients are compared with others'.

Axes: B batch, C channels, H W pixels or positions, G group of minibatch statistics, M groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError, choose

SLOPE = 0.2
"""Of every LeakyReLU, in pix2pix and in StyleGAN2."""
DEPTH_LIMIT = 16
"""Halvings of a picture: 65,536 pixels would be left with one."""


class DiscriminatorConfig(StrictConfig):
    """Which discriminator, and how large. An option that the kind does not have is refused."""

    kind: Literal["patchgan", "stylegan"] = "patchgan"
    """patchgan judges overlapping patches (Isola et al. 2017, arXiv 1611.07004); stylegan the whole picture (Karras et
    al. 2020, arXiv 1912.04958), which scored better in ViT-VQGAN (FID 1.55 against 3.88)."""
    channels: int = Field(default=64, gt=0)
    """Width of the first level; it doubles with each halving of the resolution."""
    layers: int = Field(default=3, gt=0)
    """Halvings in a patchgan: 3 sees patches of 70 x 70 pixels. A stylegan halves until 4 x 4 are left."""
    norm: Literal["group", "batch", "none"] = "batch"
    """Of a patchgan. batch: what taming published; each process and each half (real, fake) is normalized by itself, and a
    gradient penalty mixes samples. none: as quick to learn, and exact with R1 and several processes. group: exact too, but it
    hides the contrast of a picture: it told blurred 64 px emoji from real ones after 150 steps in 65 % of pairs, batch in
    100 %, none in 89 % (docs/tokenizers.md)."""
    max_channels: int = Field(default=512, gt=0)
    """Where the doubling stops."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.channels > self.max_channels:
            raise ValueError(f"channels {self.channels} is above max_channels {self.max_channels}; "
                             f"use at most {self.max_channels}, or raise max_channels")
        if self.layers > DEPTH_LIMIT:
            raise ValueError(f"layers {self.layers} is above {DEPTH_LIMIT}, which no picture is large enough for; use 3")
        if self.kind == "stylegan":
            for name, value in (("layers", self.layers), ("norm", self.norm)):
                default = type(self).model_fields[name].default
                if value != default:
                    raise ValueError(f"{name} {value} has no effect on kind stylegan, whose depth follows from the "
                                     f"resolution and which has no norm; leave {name} at {default}, or use kind patchgan")
        return self


class PatchDiscriminator(nn.Module):
    """PatchGAN: 4x4 convolutions, of which `layers` halve the picture; the depth 3 of pix2pix and taming sees 70 pixels."""

    def __init__(self, config: DiscriminatorConfig, resolution: int, in_channels: int = 3) -> None:
        """UserError if a picture of `resolution` is too small for `layers`."""
        super().__init__()
        smallest = 3 * 2**config.layers  # the last two convolutions take one position each
        if resolution < smallest:
            fitting = int(math.log2(resolution / 3)) if resolution >= 6 else 0
            remedy = f"use at most {fitting} layers" if fitting else "use a larger picture"
            raise UserError(f"discriminator.layers {config.layers} needs pictures of {smallest} pixels or more, "
                            f"got {resolution}; {remedy}")
        widths = [min(config.channels * 2**level, config.max_channels) for level in range(config.layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            bias = config.norm == "none"  # a norm has its own
            body.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=bias))
            body += [*_NORMS[config.norm](widths[level]), nn.LeakyReLU(SLOPE)]
        body.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.body = nn.Sequential(*body)
        self.apply(_initialize)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] in [-1, 1] -> logits [B, 1, H/2^layers - 2, W/2^layers - 2] float32, high where real."""
        with torch.autocast(image.device.type, enabled=False):
            return self.body(image.float())


def _group_norm(channels: int) -> list[nn.Module]:
    """At least four channels a group: the last norm sees as few as 2 x 2 positions, too few for statistics alone."""
    groups = max(n for n in (1, 2, 4, 8, 16, 32) if n == 1 or (channels % n == 0 and channels >= 4 * n))
    return [nn.GroupNorm(groups, channels)]


_NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "group": _group_norm, "batch": lambda channels: [nn.BatchNorm2d(channels)], "none": lambda channels: []}


def _initialize(module: nn.Module) -> None:
    """pix2pix: weights N(0, 0.02), gains N(1, 0.02), no offsets."""
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 0.0 if isinstance(module, nn.Conv2d) else 1.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class EqualConv(nn.Module):
    """Convolution of any kernel whose weights are N(0, 1) and scaled when used (Karras et al. 2018, section 4.1).

    All layers then learn at the same speed under an optimizer that normalizes its steps. `halve`: blur, then stride 2.
    """

    filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, halve: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = (in_channels * kernel**2) ** -0.5
        self.halve = halve
        self.padding = kernel // 2
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # the filter of StyleGAN2; without it a stride aliases
        self.register_buffer("filter", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W], or half the size."""
        if not self.halve:
            return F.conv2d(hidden, self.weight * self.scale, self.bias, padding=self.padding)
        channels = hidden.shape[1]
        # Blur [B, C, H+2p-1, W+2p-1]: all that the unpadded convolution reads for H/2 outputs, centred.
        hidden = F.conv2d(hidden, self.filter.expand(channels, 1, 4, 4), padding=1 + self.padding, groups=channels)
        return F.conv2d(hidden, self.weight * self.scale, self.bias, stride=2)


class EqualLinear(nn.Module):
    """Linear layer with the weights of EqualConv."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = in_features**-0.5

    def forward(self, features: Tensor) -> Tensor:
        """[B, C_in] -> [B, C_out]."""
        return F.linear(features, self.weight * self.scale, self.bias)


def activate(hidden: Tensor) -> Tensor:
    """LeakyReLU with the gain sqrt(2), which keeps the variance of normal inputs about the same."""
    return F.leaky_relu(hidden, SLOPE) * math.sqrt(2)


class DownBlock(nn.Module):
    """Two 3x3 convolutions, the second halves; a 1x1 convolution on the way around."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(in_channels, in_channels, 3)
        self.conv2 = EqualConv(in_channels, out_channels, 3, halve=True)
        self.skip = EqualConv(in_channels, out_channels, 1, halve=True, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H/2, W/2]; the sum of two is scaled back to the variance of one."""
        return (activate(self.conv2(activate(self.conv1(hidden)))) + self.skip(hidden)) / math.sqrt(2)


def statistics_group(batch: int) -> int:
    """Samples of a minibatch-statistics group: the divisor of the batch nearest to StyleGAN2's 4, not 1 unless it must."""
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    return min(divisors, key=lambda size: (abs(size - 4), size), default=1)


def append_deviation(hidden: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C+1, H, W]: the new channel is how much the samples of a group differ.

    One number a group, the mean over C, H, W of the standard deviation over its samples (Karras et al. 2018, section 3,
    in the form of StyleGAN2). A generator that makes the same picture again and again is seen by it.
    """
    groups = rearrange(hidden, "(g m) c h w -> g m c h w", g=statistics_group(hidden.shape[0]))
    deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt()  # the root has no slope at 0
    per_group = reduce(deviation, "m c h w -> m", "mean")
    height, width = hidden.shape[2:]
    channel = repeat(per_group, "m -> (g m) 1 h w", g=groups.shape[0], h=height, w=width)
    return torch.cat([hidden, channel], dim=1)


class StyleGANDiscriminator(nn.Module):
    """The residual discriminator of StyleGAN2, down to 4 x 4 positions.

    64 channels at 256 pixels are the widths of the paper's smaller networks (half of config F).
    """

    def __init__(self, config: DiscriminatorConfig, resolution: int, in_channels: int = 3) -> None:
        """UserError if `resolution` is no power of two, or below 8."""
        super().__init__()
        depth = int(math.log2(resolution / 4)) if resolution >= 8 else 0
        if not depth or resolution != 4 * 2**depth:
            raise UserError("discriminator.kind stylegan halves pictures down to 4 pixels, which takes a power of two from 8 "
                            f"on, got {resolution}; use a resolution of {max(8, 4 * 2**depth)}, or kind patchgan")
        widths = [min(config.channels * 2**level, config.max_channels) for level in range(depth + 1)]
        self.expected = (in_channels, resolution, resolution)
        self.stem = EqualConv(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList(DownBlock(before, after) for before, after in pairwise(widths))
        self.conv = EqualConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualLinear(widths[-1] * 4 * 4, widths[-1])
        self.head = EqualLinear(widths[-1], 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] in [-1, 1] of the resolution -> logits [B, 1] float32, high where real. UserError otherwise."""
        if image.ndim != 4 or tuple(image.shape[1:]) != self.expected:
            raise UserError(f"expected an image [B, {', '.join(map(str, self.expected))}], got {list(image.shape)}")
        with torch.autocast(image.device.type, enabled=False):
            hidden = activate(self.stem(image.float()))
            for block in self.blocks:
                hidden = block(hidden)
            hidden = activate(self.conv(append_deviation(hidden)))
            return self.head(activate(self.hidden(hidden.flatten(1))))


DISCRIMINATORS: dict[str, type[PatchDiscriminator] | type[StyleGANDiscriminator]] = {
    "patchgan": PatchDiscriminator, "stylegan": StyleGANDiscriminator}


def build_discriminator(config: DiscriminatorConfig, resolution: int, in_channels: int = 3) -> nn.Module:
    """The discriminator of a config, for pictures [B, in_channels, resolution, resolution] in [-1, 1].

    UserError that names what to change if the resolution is too small for its depth, or not one it can halve.
    """
    return choose(DISCRIMINATORS, config.kind, "discriminator")(config, resolution, in_channels)
