"""dVAE: image <-> grid of codes through a relaxed categorical.

DALL-E (Ramesh et al. 2021, arXiv 2102.12092), appendix A. The encoder gives logits over the K codes
of each position. Training decodes a Gumbel-softmax sample of them, a weighted mean of code vectors
that sharpens as the temperature falls. A code, wherever one is reported, is the argmax of the
logits without noise. The noise comes from torch's global generator, whose state a resumed run
restores.

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size,
C channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizer_image.config import ImageTokenizerConfig, nearest_multiple
from tokenizer_image.image_tokenizer import ImageTokenizer, Reconstruction
from tokenizer_image.layers import Checkpointed
from tokenizer_image.losses import logit_laplace_loss, logit_laplace_mean
from tokenizer_image.quantizer_config import Positive
from tokenizer_image.quantizers import LossPart
from tokenizer_image.quantizers.gumbel import gumbel_softmax, half_cosine, kl_to_uniform


class DVAEConfig(ImageTokenizerConfig):
    """A discrete VAE; structure, sizes and schedules are DALL-E's."""

    kind: Literal["dvae"] = "dvae"
    codebook_size: int = Field(default=8192, ge=2)
    """K: codes to choose from. Training holds B*K*h*w numbers several times: a share of each code
    at each position."""
    embed_dim: Positive = 128
    """Length of a code vector: the width that the decoder starts from."""
    width: Positive = 256
    """Channels at the image's resolution; each further group doubles them."""
    groups: int = Field(default=4, ge=1, le=8)
    """Groups of blocks; each after the first halves the resolution, so that 4 is f8."""
    blocks_per_group: Positive = 2
    """Residual blocks per group, of four convolutions each; more where images are detailed and
    memory is left."""
    output: Literal["pixels", "logit_laplace"] = "logit_laplace"
    """logit_laplace: the decoder gives a mean and a scale for each value, and its likelihood is the
    loss (then set l1_weight to 0, unless you want both). pixels: it gives the image, for l1, l2,
    perceptual and adversarial losses."""
    kl_weight: float = Field(default=6.6, ge=0)
    """DALL-E's beta: weight of the KL to uniform codes, both summed over an image. The losses
    here are means, so the term is weighted by beta / (f^2 x channels), DALL-E's own beta/192
    with f8. Lower it for `pixels`, whose l1 is far below a log-likelihood, and where few codes
    are in use."""
    kl_steps: int = Field(default=5_000, ge=0)
    """Steps over which the KL weight rises, along half a cosine; at most the length of the run."""
    temperature_start: float = Field(default=1.0, gt=0)
    """Temperature of the samples at the first step: soft, so that every code gets a gradient."""
    temperature_end: float = Field(default=1 / 16, gt=0)
    """Temperature at the end. Lower brings training nearer to the hard codes that are decoded
    later, at a noisier gradient."""
    temperature_steps: int = Field(default=150_000, ge=0)
    """Steps over which the temperature falls, along half a cosine; at most the length of the run,
    which so ends at temperature_end. DALL-E: 3,000,000 steps; a straight line often diverged."""

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f8."""
        return 2 ** (self.groups - 1)

    @property
    def output_channels(self) -> int:
        """Channels of the decoder's output: with logit_laplace a mean and a log-scale for each."""
        if self.output == "logit_laplace":
            return 2 * self.in_channels
        return self.in_channels

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {self.downsampling} "
                f"({self.groups} groups); "
                f"use {nearest_multiple(self.resolution, self.downsampling)}")
        if self.width % 4:
            raise ValueError(
                f"width {self.width} is not divisible by 4 (a block's inner width is a quarter); "
                f"use {nearest_multiple(self.width, 4)}")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end {self.temperature_end} is above temperature_start "
                f"{self.temperature_start}; the temperature falls, so swap them")
        return self


def conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """Build a convolution that keeps the resolution, with DALL-E's initial weights.

    Their variance is 1 / inputs, the bias is 0.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(in_channels * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class BottleneckBlock(nn.Module):
    """Residual block: four times ReLU and convolution, at a quarter of the width.

    `gain` scales the residual: DALL-E's 1 / (blocks of the encoder or decoder)^2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernels: tuple[int, int, int, int],
                 gain: float) -> None:
        super().__init__()
        inner = out_channels // 4
        self.gain = gain
        self.conv_1 = conv(in_channels, inner, kernels[0])
        self.conv_2 = conv(inner, inner, kernels[1])
        self.conv_3 = conv(inner, inner, kernels[2])
        self.conv_4 = conv(inner, out_channels, kernels[3])
        self.id_path: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.id_path = conv(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        residual = hidden
        for layer in (self.conv_1, self.conv_2, self.conv_3, self.conv_4):
            residual = layer(F.relu(residual))
        return self.id_path(hidden) + self.gain * residual


def _block_group(in_channels: int, out_channels: int, kernels: tuple[int, int, int, int],
                 config: DVAEConfig, resample: nn.Module) -> nn.Sequential:
    """Build the blocks of one resolution and the resampling after them."""
    gain = 1 / (config.groups * config.blocks_per_group) ** 2
    widths = [in_channels] + [out_channels] * config.blocks_per_group
    blocks = [BottleneckBlock(before, after, kernels, gain) for before, after in pairwise(widths)]
    return nn.Sequential(*blocks, resample)


class Encoder(Checkpointed):
    """Image -> logits of every code at every position."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.conv_in = conv(config.in_channels, config.width, 7)
        self.groups = nn.ModuleList()
        channels = config.width
        last = config.groups - 1
        for index in range(config.groups):
            out = config.width * 2**index
            resample = nn.MaxPool2d(2) if index != last else nn.Identity()
            self.groups.append(_block_group(channels, out, (3, 3, 3, 1), config, resample))
            channels = out
        self.conv_out = conv(channels, config.codebook_size, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> logits [B, K, h, w] float32."""
        hidden = self.conv_in(image)
        for group in self.groups:
            hidden = self.run(group, hidden)

        # The last convolution runs in float32, as published: bfloat16 logits have three digits, and
        # many tie for the largest.
        with torch.autocast(image.device.type, enabled=False):
            bias = None if self.conv_out.bias is None else self.conv_out.bias.float()
            return F.conv2d(F.relu(hidden).float(), self.conv_out.weight.float(), bias)


class Decoder(Checkpointed):
    """Code vectors -> the image, or the mean and log-scale of every value of it."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        channels = config.embed_dim
        for index in reversed(range(config.groups)):
            out = config.width * 2**index
            resample = nn.Upsample(scale_factor=2, mode="nearest") if index else nn.Identity()
            self.groups.append(_block_group(channels, out, (1, 3, 3, 3), config, resample))
            channels = out
        self.conv_out = conv(channels, config.output_channels, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w] -> [B, output_channels, S, S]."""
        hidden = vectors
        for group in self.groups:
            hidden = self.run(group, hidden)
        return self.conv_out(F.relu(hidden))


class DVAE(ImageTokenizer):
    """DALL-E's image tokenizer.

    The codebook, the decoder's input layer, is kept with the encoder: it says what a code is.
    """

    kind = "dvae"
    config_class = DVAEConfig
    config: DVAEConfig
    code_parts = ("encoder", "embedding")
    temperature: float
    kl_weight: float

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        # published as a 1x1 convolution over shares of codes, which sum to 1: so its bias would be
        # part of every code vector
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)
        self.decoder = Decoder(config)
        self.set_step(0, total=1)  # both schedules stand at their start until training sets a step

    @property
    def last_layer(self) -> Tensor:
        """The weight of the convolution that makes the pixels."""
        return self.decoder.conv_out.weight

    @property
    def codebook(self) -> Tensor:
        """All code vectors [K, D] float32."""
        return self.embedding.weight.float()

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Set temperature and KL weight (beta) for training step `step` (from 0) of `total`."""
        config = self.config
        fall_steps = min(config.temperature_steps, total)
        rise_steps = min(config.kl_steps, total)
        self.temperature = half_cosine(
            config.temperature_start, config.temperature_end, step, fall_steps)
        self.kl_weight = half_cosine(0.0, config.kl_weight, step, rise_steps)
        return {"temperature": self.temperature, "kl_weight": self.kl_weight}

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> logits [B, K, h, w] float32."""
        return self.encoder(image)

    def codes_of(self, latents: Tensor) -> Tensor:
        """Logits [B, K, h, w] -> codes [B, h, w] int64: the largest, without noise."""
        return latents.argmax(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w], in the decoder's dtype."""
        vectors = rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")
        return vectors.to(self.last_layer.dtype)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w] -> image [B, 3, S, S], unclamped, with gradients."""
        return self._image(self.decoder(vectors))

    def _image(self, output: Tensor) -> Tensor:
        """Decoder output [B, output_channels, S, S] -> image [B, 3, S, S]."""
        return logit_laplace_mean(output) if self.config.output == "logit_laplace" else output

    def reconstruct(self, image: Tensor) -> Reconstruction:
        """Forward of a training step: a relaxed sample in training mode, hard codes in eval mode.

        Eval mode has no gradient to the encoder. Loss terms: `kl`, and `logit_laplace` with that
        output.
        """
        logits = self.latents(image)
        codes = self.codes_of(logits)
        if self.training:
            vectors = self._sampled_vectors(logits)
        else:
            vectors = self.lookup(codes)
        output = self.decoder(vectors)

        values_per_code = self.config.downsampling**2 * self.config.in_channels
        losses = {"kl": LossPart(kl_to_uniform(logits), self.kl_weight / values_per_code)}
        if self.config.output == "logit_laplace":
            losses["logit_laplace"] = LossPart(logit_laplace_loss(output, image), 1.0)
        return Reconstruction(self._image(output), codes, losses)

    def _sampled_vectors(self, logits: Tensor) -> Tensor:
        """Logits [B, K, h, w] -> mean of the code vectors under a relaxed sample [B, D, h, w]."""
        with torch.autocast(logits.device.type, enabled=False):
            sample = gumbel_softmax(logits, self.temperature)  # sums to 1 over K
            vectors = torch.einsum("bkhw,kd->bdhw", sample, self.codebook)
        return vectors.to(self.last_layer.dtype)


DVAE_PRESETS: dict[str, DVAEConfig] = {
    "dvae-debug": DVAEConfig(
        resolution=16, codebook_size=64, embed_dim=8, width=16, groups=3, blocks_per_group=1,
        output="pixels", kl_weight=3.0, kl_steps=100, temperature_steps=1000),
    "dalle-dvae": DVAEConfig(),
}
