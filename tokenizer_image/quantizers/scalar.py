"""Quantizers without a learned codebook: every number of a latent is rounded on its own.

Axes: B batch, h w latent grid, D numbers of a latent, K codebook size, n latents (= B*h*w).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch import distributed as dist
from vector_quantize_pytorch import FSQ

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import LossPart, Quantized, Quantizer, process_count


class FiniteScalarQuantizer(Quantizer):
    """FSQ: number i of a latent is squashed and rounded to `levels[i]` values (arXiv 2309.15505).

    A code is the level indices in mixed radix, the first number counting least. The library only
    rounds: its float32 codes are inexact above 2^24, and its codebook cannot be built on `meta`.
    """

    levels: Tensor
    place_values: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        levels = config.levels
        place_values = [math.prod(levels[:place]) for place in range(len(levels))]
        self.fsq = FSQ(levels=list(levels), return_indices=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)  # [D]
        self.register_buffer("place_values", torch.tensor(place_values), persistent=False)  # [D]

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32: all combinations of levels, scaled to [-1, 1]."""
        return self._vectors(torch.arange(self.codebook_size, device=self.levels.device))

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K)."""
        return self._codes(self._round(latents))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(self._vectors(codes), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> rounded, with straight-through gradients. No loss."""
        rounded = self._round(latents)
        vectors = rearrange(rounded, "b h w d -> b d h w")
        return Quantized(vectors, self._codes(rounded), {})

    def _round(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> vectors [B, h, w, D] in [-1, 1]."""
        return self.fsq.quantize(rearrange(latents, "b d h w -> b h w d"))

    def _codes(self, rounded: Tensor) -> Tensor:
        """Vectors [..., D] -> codes [...]."""
        half = self.levels // 2
        level_indices = (rounded.detach() * half).round().long() + half
        return (level_indices * self.place_values).sum(dim=-1)

    def _vectors(self, codes: Tensor) -> Tensor:
        """Codes [...] -> vectors [..., D]."""
        half = self.levels // 2
        level_indices = codes[..., None] // self.place_values % self.levels
        return (level_indices - half) / half


class LookupFreeQuantizer(Quantizer):
    """LFQ: a code is the signs of a latent's numbers, K = 2^D, the first counting most.

    Yu et al. 2023, arXiv 2310.05737. Not the library's: its batch entropy drops the sum over
    processes, is flat for probabilities under 1e-5 (so above 100,000 codes), and takes n x K
    numbers; here n x sqrt(K) + K.
    """

    place_values: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.scale = dim ** -0.5 if config.spherical else 1.0  # of every number of a code vector
        place_values = 2 ** torch.arange(dim - 1, -1, -1)
        self.register_buffer("place_values", place_values, persistent=False)  # [D]

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32: all combinations of signs, of length 1 if spherical."""
        return self._vectors(torch.arange(self.codebook_size, device=self.place_values.device))

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64; 0 counts as negative."""
        positive = rearrange(latents, "b d h w -> b h w d") > 0
        return (positive * self.place_values).sum(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(self._vectors(codes), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> signs, with straight-through gradients.

        Loss terms in nats, of the soft assignment softmax(-|z - e|^2 / temperature):
        sample_entropy, minimized so that each latent is sure of its code, and batch_entropy,
        maximized so that all codes are in use.
        """
        target = latents
        if self.config.spherical:
            target = F.normalize(latents, dim=1)
        codes = self.search(latents)
        vectors = self.lookup(codes)

        # |z - e|^2 is a sum over the numbers, and the codes are all combinations of signs: so the
        # soft assignment is D independent signs, and the entropy of a latent is the sum of theirs.
        flat = rearrange(target, "b d h w -> (b h w) d")
        sign_logits = flat * (4 * self.scale / self.config.entropy_temperature)
        sign_entropies = F.softplus(sign_logits) - sign_logits * sign_logits.sigmoid()
        sample_entropy = sign_entropies.sum(dim=1).mean()

        probs = self._mean_code_probs(sign_logits)
        log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
        batch_entropy = -(probs * log_probs).sum()

        config = self.config
        diversity_weight = -config.entropy_weight * config.diversity_gamma  # negative: maximized
        losses = {"commit": LossPart(F.mse_loss(target, vectors), config.commitment_weight),
                  "sample_entropy": LossPart(sample_entropy, config.entropy_weight),
                  "batch_entropy": LossPart(batch_entropy, diversity_weight)}
        return Quantized(target + (vectors - target).detach(), codes, losses)

    def _mean_code_probs(self, sign_logits: Tensor) -> Tensor:
        """Logits [n, D] of positive signs -> mean probability of every code [2^(D/2), 2^(D/2)].

        Over all processes in training mode.
        """
        # Codes factor into two halves of their bits, so that [n, K] is never formed: the mean over
        # n of the outer product of the halves is one matrix product.
        middle = self.dim // 2
        first = _sign_combination_probs(sign_logits[:, :middle])
        second = _sign_combination_probs(sign_logits[:, middle:])
        probs = first.T @ second / max(1, len(sign_logits))

        processes = process_count()
        if self.training and processes > 1:
            summed = probs.detach().clone()
            dist.all_reduce(summed)
            # gradients are averaged over processes later, so each passes its own in full
            probs = summed / processes + (probs - probs.detach())
        return probs

    def _vectors(self, codes: Tensor) -> Tensor:
        """Codes [...] -> vectors [..., D] of +-scale."""
        bits = (codes[..., None] & self.place_values) != 0
        return bits.float().mul(2).sub(1).mul(self.scale)


def _sign_combination_probs(sign_logits: Tensor) -> Tensor:
    """Logits [n, bits] of positive signs -> probability of each combination [n, 2^bits]."""
    table = sign_logits.new_ones(len(sign_logits), 1)  # [n, 2^bits so far]
    for bit in sign_logits.unbind(dim=1):
        pair = torch.stack([(-bit).sigmoid(), bit.sigmoid()], dim=1)  # [n, 2]
        table = (table[:, :, None] * pair[:, None, :]).flatten(1)
    return table
