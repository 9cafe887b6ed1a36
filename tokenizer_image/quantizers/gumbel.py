"""Codes drawn from a categorical: the Gumbel-softmax relaxation, its schedule and prior, and the quantizer made of them.

The noise comes from torch's global generator, whose state a resumed run restores. tokenizer_image/dvae.py draws so too.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import LossPart, Quantized, Quantizer, largest_score


def half_cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps` and beyond, flat at both ends."""
    share = min(1.0, step / steps) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) over K codes to the uniform distribution, logits [B, K, h, w] -> mean over positions [] in nats.

    Between 0 and log K.
    """
    log_shares = logits.float().log_softmax(dim=1)
    return (log_shares.exp() * log_shares).sum(dim=1).mean() + math.log(logits.shape[1])


def gumbel_softmax(logits: Tensor, temperature: float, straight_through: bool = False) -> Tensor:
    """A sample of softmax(logits) over dimension 1, shape as logits, float32 (Jang et al. 2016, arXiv 1611.01144).

    Relaxed: shares that sum to 1. straight_through: 1 at the largest share and 0 elsewhere, with the gradient of the shares.
    """
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().clamp_min_(1e-20).log_()  # minus a Gumbel sample
    shares = ((logits.float() - noise) / temperature).softmax(dim=1)
    if not straight_through:
        return shares
    drawn = torch.zeros_like(shares).scatter_(1, shares.argmax(dim=1, keepdim=True), 1.0)
    return drawn + (shares - shares.detach())


class GumbelQuantizer(Quantizer):
    """A 1x1 convolution scores all K codes at each position, and the best one's vector is decoded (taming's GumbelVQ).

    Training decodes a sample of those scores; a code that is reported or encoded is the best one, without noise. Training
    holds B*K*h*w numbers several times over; encoding looks at them in blocks.
    """

    temperature: float

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.proj = nn.Conv2d(dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, dim)
        self.set_step(0, total=1)  # until training says otherwise the schedule stands at its start

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32."""
        return self.embed.weight.float()

    def code_tensors(self) -> dict[str, Tensor]:
        """The codebook, and the weights that score the codes."""
        return {**super().code_tensors(), "proj.weight": self.proj.weight, "proj.bias": self._bias}

    @property
    def _bias(self) -> Tensor:
        assert self.proj.bias is not None
        return self.proj.bias

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Tell the quantizer which of `total` training steps comes next (from 0) -> its temperature."""
        config = self.config
        self.temperature = half_cosine(config.temperature_start, config.temperature_end, step,
                                       min(config.temperature_steps, total))
        return {"temperature": self.temperature}

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K); ties go to the lowest code."""
        return largest_score(latents, self.proj.weight.float().flatten(1), self._bias.float())

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> a sample in training mode, the codes themselves in eval mode, which pass no gradient
        to the latents. Loss part: `kl`."""
        logits = F.conv2d(latents, self.proj.weight.float(), self._bias.float())  # [B, K, h, w]
        losses = {"kl": LossPart(kl_to_uniform(logits), self.config.kl_weight)}
        with torch.no_grad():
            codes = self.search(latents)
        if not self.training:
            return Quantized(self.lookup(codes), codes, losses)
        drawn = gumbel_softmax(logits, self.temperature, self.config.straight_through)
        return Quantized(torch.einsum("bkhw,kd->bdhw", drawn, self.codebook), codes, losses)
