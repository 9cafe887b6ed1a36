"""Discriminators: networks that tell images from reconstructions, for the adversarial loss.

All run in float32, also under autocast: R1 differentiates them twice, and the adaptive weight
compares the length of their gradients with that of the reconstruction's.

Axes: B batch, C channels, H W pixels or positions, G samples per minibatch-statistics group.
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

LEAKY_SLOPE = 0.2  # of every LeakyReLU, in pix2pix and in StyleGAN2
MAX_LAYERS = 16  # halvings of an image: 65,536 pixels would be left with one


class DiscriminatorConfig(StrictConfig):
    """Kind and size of a discriminator. An option that the kind does not have is refused."""

    kind: Literal["patchgan", "stylegan"] = "patchgan"
    """patchgan scores overlapping patches (Isola et al. 2017, arXiv 1611.07004). stylegan scores
    the whole image (Karras et al. 2020, arXiv 1912.04958): FID 1.55 against 3.88 in ViT-VQGAN."""
    channels: int = Field(default=64, gt=0)
    """Width of the first level; it doubles with each halving of the resolution."""
    layers: int = Field(default=3, gt=0)
    """Halvings in a patchgan: 3 sees patches of 70 x 70 pixels. A stylegan halves down to 4 x 4."""
    norm: Literal["group", "batch", "none"] = "batch"
    """Norm of a patchgan. batch: as taming published; each process and each half (real, fake) is
    normalized by itself, and a gradient penalty mixes samples. none: as quick to learn, and
    exact with R1 and several processes. group: exact too, but hides the contrast of an image:
    after 150 steps it told blurred 64 px emoji from real ones in 65 % of pairs, batch in 100 %,
    none in 89 % (docs/tokenizers.md)."""
    max_channels: int = Field(default=512, gt=0)
    """Width at which the doubling stops."""

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.channels > self.max_channels:
            raise ValueError(
                f"channels {self.channels} is above max_channels {self.max_channels}; "
                f"use at most {self.max_channels}, or raise max_channels")
        if self.layers > MAX_LAYERS:
            raise ValueError(f"layers {self.layers} is above {MAX_LAYERS}, which no picture is "
                             "large enough for; use 3")
        if self.kind == "stylegan":
            for name in ("layers", "norm"):
                value = getattr(self, name)
                default = type(self).model_fields[name].default
                if value != default:
                    raise ValueError(
                        f"{name} {value} has no effect on kind stylegan, whose depth follows from "
                        f"the resolution and which has no norm; leave {name} at {default}, or use "
                        "kind patchgan")
        return self

    def widths(self, halvings: int) -> list[int]:
        """Channels of the first level and after each halving."""
        return [min(self.channels * 2**level, self.max_channels) for level in range(halvings + 1)]


# ---- PatchGAN

class PatchDiscriminator(nn.Module):
    """PatchGAN: 4x4 convolutions, of which `layers` halve the image."""

    def __init__(self, config: DiscriminatorConfig, resolution: int, in_channels: int = 3) -> None:
        """UserError if an image of `resolution` is too small for `layers`."""
        super().__init__()
        smallest = 3 * 2**config.layers  # the last two convolutions take one position each
        if resolution < smallest:
            fitting = int(math.log2(resolution / 3)) if resolution >= 6 else 0
            remedy = f"use at most {fitting} layers" if fitting else "use a larger picture"
            raise UserError(f"discriminator.layers {config.layers} needs pictures of {smallest} "
                            f"pixels or more, got {resolution}; {remedy}")

        widths = config.widths(config.layers)
        bias = config.norm == "none"  # a norm has its own
        body: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
                                 nn.LeakyReLU(LEAKY_SLOPE)]
        for level, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if level < config.layers else 1  # the first convolution halves too
            body.append(nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=bias))
            body += [*_NORMS[config.norm](after), nn.LeakyReLU(LEAKY_SLOPE)]
        body.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.body = nn.Sequential(*body)
        self.apply(_init_as_pix2pix)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] in [-1, 1] -> logits [B, 1, H/2^layers - 2, W/2^layers - 2] float32.

        High where the patch looks real.
        """
        with torch.autocast(image.device.type, enabled=False):
            return self.body(image.float())


def _group_norm(channels: int) -> list[nn.Module]:
    # At least four channels per group: the last norm sees as few as 2 x 2 positions, too few for
    # statistics of one channel.
    fitting = [n for n in (2, 4, 8, 16, 32) if channels % n == 0 and channels >= 4 * n]
    return [nn.GroupNorm(max(fitting, default=1), channels)]


_NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "group": _group_norm,
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "none": lambda channels: [],
}


def _init_as_pix2pix(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02) and gains from N(1, 0.02); set biases to 0."""
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        mean = 0.0 if isinstance(module, nn.Conv2d) else 1.0
        nn.init.normal_(module.weight, mean, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---- StyleGAN2

class EqualConv(nn.Module):
    """Convolution with weights N(0, 1), scaled when used (Karras et al. 2018, section 4.1).

    All layers then learn at the same speed under an optimizer that normalizes its steps. `halve`:
    blur, then stride 2.
    """

    filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, halve: bool = False,
                 bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = (in_channels * kernel**2) ** -0.5
        self.halve = halve
        self.padding = kernel // 2
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8  # StyleGAN2's filter; a bare stride aliases
        kernel_2d = torch.outer(taps, taps)[None, None]  # [1, 1, 4, 4]
        self.register_buffer("filter", kernel_2d, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W], or half the size."""
        weight = self.weight * self.scale
        if not self.halve:
            return F.conv2d(hidden, weight, self.bias, padding=self.padding)

        # [B, C, H+2p-1, W+2p-1]: all that the unpadded convolution reads for H/2 outputs, centred
        channels = hidden.shape[1]
        blur = self.filter.expand(channels, 1, 4, 4)
        blurred = F.conv2d(hidden, blur, padding=1 + self.padding, groups=channels)
        return F.conv2d(blurred, weight, self.bias, stride=2)


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


def scaled_leaky_relu(hidden: Tensor) -> Tensor:
    """LeakyReLU times sqrt(2), which about keeps the variance of normal inputs."""
    return F.leaky_relu(hidden, LEAKY_SLOPE) * math.sqrt(2)


class DownBlock(nn.Module):
    """Two 3x3 convolutions, of which the second halves, beside a 1x1 skip convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualConv(in_channels, in_channels, 3)
        self.conv2 = EqualConv(in_channels, out_channels, 3, halve=True)
        self.skip = EqualConv(in_channels, out_channels, 1, halve=True, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H/2, W/2]."""
        out = scaled_leaky_relu(self.conv1(hidden))
        out = scaled_leaky_relu(self.conv2(out))
        return (out + self.skip(hidden)) / math.sqrt(2)  # the sum of two at the variance of one


def statistics_group(batch: int) -> int:
    """Samples per minibatch-statistics group: the divisor of the batch nearest to StyleGAN2's 4.

    1 only if the batch is 1.
    """
    divisors = [size for size in range(2, batch + 1) if batch % size == 0]
    return min(divisors, key=lambda size: (abs(size - 4), size), default=1)


def append_deviation(hidden: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C+1, H, W]: the new channel is how much the samples of a group differ.

    One number per group: the mean over C, H, W of the standard deviation over its samples (Karras
    et al. 2018, section 3, in the form of StyleGAN2). It gives away a generator that makes the same
    image again and again.
    """
    groups = rearrange(hidden, "(g m) c h w -> g m c h w", g=statistics_group(hidden.shape[0]))
    variance = groups.var(dim=0, unbiased=False)  # [m, C, H, W]
    deviation = (variance + 1e-8).sqrt()  # the root has no slope at 0
    per_group = reduce(deviation, "m c h w -> m", "mean")

    height, width = hidden.shape[2:]
    channel = repeat(per_group, "m -> (g m) 1 h w", g=groups.shape[0], h=height, w=width)
    return torch.cat([hidden, channel], dim=1)


class StyleGANDiscriminator(nn.Module):
    """Residual discriminator of StyleGAN2, down to 4 x 4 positions.

    64 channels at 256 pixels are the widths of the paper's smaller networks (half of config F).
    """

    def __init__(self, config: DiscriminatorConfig, resolution: int, in_channels: int = 3) -> None:
        """UserError if `resolution` is not a power of two, or below 8."""
        super().__init__()
        halvings = int(math.log2(resolution / 4)) if resolution >= 8 else 0
        if not halvings or resolution != 4 * 2**halvings:
            raise UserError(
                "discriminator.kind stylegan halves pictures down to 4 pixels, which takes a power "
                f"of two from 8 on, got {resolution}; use a resolution of "
                f"{max(8, 4 * 2**halvings)}, or kind patchgan")

        widths = config.widths(halvings)
        last = widths[-1]
        self.expected = (in_channels, resolution, resolution)
        self.stem = EqualConv(in_channels, widths[0], 1)
        self.blocks = nn.ModuleList(DownBlock(before, after) for before, after in pairwise(widths))
        self.conv = EqualConv(last + 1, last, 3)  # + 1: the channel of append_deviation
        self.hidden = EqualLinear(last * 4 * 4, last)
        self.head = EqualLinear(last, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] in [-1, 1] of the resolution -> logits [B, 1] float32, high where
        real.

        UserError on another size.
        """
        if image.ndim != 4 or tuple(image.shape[1:]) != self.expected:
            raise UserError(f"expected an image [B, {', '.join(map(str, self.expected))}], "
                            f"got {list(image.shape)}")
        with torch.autocast(image.device.type, enabled=False):
            hidden = scaled_leaky_relu(self.stem(image.float()))
            for block in self.blocks:
                hidden = block(hidden)
            hidden = scaled_leaky_relu(self.conv(append_deviation(hidden)))
            features = scaled_leaky_relu(self.hidden(hidden.flatten(1)))
            return self.head(features)


DISCRIMINATORS: dict[str, type[PatchDiscriminator] | type[StyleGANDiscriminator]] = {
    "patchgan": PatchDiscriminator,
    "stylegan": StyleGANDiscriminator,
}
"""DiscriminatorConfig.kind -> class."""


def build_discriminator(config: DiscriminatorConfig, resolution: int,
                        in_channels: int = 3) -> nn.Module:
    """Build the discriminator of a config, for images [B, in_channels, resolution, resolution].

    UserError that names what to change if the resolution is too small for its depth, or not one
    that it can halve.
    """
    discriminator = choose(DISCRIMINATORS, config.kind, "discriminator")
    return discriminator(config, resolution, in_channels)
