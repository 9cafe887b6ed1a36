"""Gumbel-softmax relaxation of codes, its schedule and KL term, and the quantizer made of them.

The noise comes from torch's global generator, whose state a resumed run restores. The dVAE
(tokenizer_image/dvae.py) uses the same functions.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import LossPart, Quantized, Quantizer
from tokenizer_image.quantizers.search import argmax_scores


def half_cosine(start: float, end: float, step: int, steps: int) -> float:
    """Interpolate from `start` at step 0 to `end` at `steps` and beyond, flat at both ends."""
    progress = min(1.0, step / steps) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits [B, K, h, w]) over K codes to the uniform distribution -> [] in nats.

    Mean over positions, between 0 and log K.
    """
    log_probs = logits.float().log_softmax(dim=1)
    negative_entropy = (log_probs.exp() * log_probs).sum(dim=1).mean()
    return negative_entropy + math.log(logits.shape[1])


def gumbel_softmax(logits: Tensor, temperature: float, straight_through: bool = False) -> Tensor:
    """Draw a relaxed sample of softmax(logits) over dimension 1 (arXiv 1611.01144).

    Shape as logits, float32, sums to 1. straight_through: one-hot at the largest entry, with the
    gradient of the relaxed sample.
    """
    # -log of an exponential sample is a Gumbel sample; the floor keeps log finite
    exponential = torch.empty_like(logits, dtype=torch.float32).exponential_()
    negative_gumbel = exponential.clamp_min_(1e-20).log_()
    soft = ((logits.float() - negative_gumbel) / temperature).softmax(dim=1)
    if not straight_through:
        return soft

    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


class GumbelQuantizer(Quantizer):
    """A 1x1 convolution scores all K codes at each position (taming's GumbelVQ).

    Training decodes a sample of those scores and holds B*K*h*w numbers several times over. The
    code that is reported or encoded is the best one, without noise, searched in blocks.
    """

    temperature: float

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.proj = nn.Conv2d(dim, codebook_size, 1)
        self.embed = nn.Embedding(codebook_size, dim)
        self.set_step(0, total=1)  # the schedule stands at its start until training sets a step

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32."""
        return self.embed.weight.float()

    @property
    def _bias(self) -> Tensor:
        assert self.proj.bias is not None
        return self.proj.bias

    def code_tensors(self) -> dict[str, Tensor]:
        """The codebook, and the weights that score the codes."""
        return {**super().code_tensors(), "proj.weight": self.proj.weight, "proj.bias": self._bias}

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Set the temperature for training step `step` (from 0) of `total` -> it, for the log."""
        config = self.config
        steps = min(config.temperature_steps, total)
        start, end = config.temperature_start, config.temperature_end
        self.temperature = half_cosine(start, end, step, steps)
        return {"temperature": self.temperature}

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64, the lowest on ties."""
        weight = self.proj.weight.float().flatten(1)  # [K, D]
        return argmax_scores(latents, weight, self._bias.float())

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> a sample in training mode, the best codes in eval mode.

        Eval mode passes no gradient to the latents. Loss term: `kl`.
        """
        logits = F.conv2d(latents, self.proj.weight.float(), self._bias.float())  # [B, K, h, w]
        losses = {"kl": LossPart(kl_to_uniform(logits), self.config.kl_weight)}
        with torch.no_grad():
            codes = self.search(latents)
        if not self.training:
            return Quantized(self.lookup(codes), codes, losses)

        sample = gumbel_softmax(logits, self.temperature, self.config.straight_through)
        vectors = torch.einsum("bkhw,kd->bdhw", sample, self.codebook)
        return Quantized(vectors, codes, losses)
