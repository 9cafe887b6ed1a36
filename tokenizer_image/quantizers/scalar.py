"""Quantizers without a learned codebook: every number of a latent is rounded by itself.

Axes: B batch, h w latent grid, D length of a code vector (numbers of a latent), K codebook size, n latents (= B*h*w).
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
    """FSQ: number i of a latent is squashed and rounded to `levels[i]` values (Mentzer et al. 2023, arXiv 2309.15505).

    A code is its level numbers in mixed radix, the first number counting least. The library rounds; codes are counted
    here, since the library's float32 cannot tell large ones apart, and its table of codes cannot be built on `meta`.
    """

    levels: Tensor
    place_values: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.fsq = FSQ(levels=list(config.levels), return_indices=False)
        values = [math.prod(config.levels[:place]) for place in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)  # [D]
        self.register_buffer("place_values", torch.tensor(values), persistent=False)  # [D]

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32: all combinations of levels, scaled to [-1, 1]."""
        return self._vectors(torch.arange(self.codebook_size, device=self.levels.device))

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K)."""
        return self._codes(self._rounded(latents))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(self._vectors(codes), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> rounded, with straight-through gradients; there is no loss term."""
        rounded = self._rounded(latents)
        return Quantized(rearrange(rounded, "b h w d -> b d h w"), self._codes(rounded), {})

    def _rounded(self, latents: Tensor) -> Tensor:
        return self.fsq.quantize(rearrange(latents, "b d h w -> b h w d"))

    def _codes(self, rounded: Tensor) -> Tensor:
        half = self.levels // 2
        return (((rounded.detach() * half).round().long() + half) * self.place_values).sum(dim=-1)

    def _vectors(self, codes: Tensor) -> Tensor:
        half = self.levels // 2
        return ((codes[..., None] // self.place_values % self.levels) - half) / half


class LookupFreeQuantizer(Quantizer):
    """LFQ: a code is the signs of a latent's numbers, K = 2^D (Yu et al. 2023, arXiv 2310.05737); the first counts most.

    Not the library's: its batch entropy is wrong with several processes (the sum over them is thrown away), it is flat for
    shares under 1e-5, so above 100,000 codes, and it takes n x K numbers; here n x sqrt(K) + K.
    """

    place_values: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        self.scale = dim ** -0.5 if config.spherical else 1.0
        self.register_buffer("place_values", 2 ** torch.arange(dim - 1, -1, -1), persistent=False)  # [D]

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32: all combinations of signs, of length 1 if spherical."""
        return self._vectors(torch.arange(self.codebook_size, device=self.place_values.device))

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64 in [0, K); 0 counts as negative."""
        return ((rearrange(latents, "b d h w -> b h w d") > 0) * self.place_values).sum(dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(self._vectors(codes), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> signs, with straight-through gradients.

        sample_entropy (made small: a latent is sure of its code) and batch_entropy (made large: all codes are in use), in
        nats, of the soft assignment softmax(-|z - e|^2 / temperature).
        """
        target = F.normalize(latents, dim=1) if self.config.spherical else latents
        codes = self.search(latents)
        vectors = self.lookup(codes)
        # |z - e|^2 is a sum over the numbers and codes are all their combinations, so that the signs are independent
        flat = rearrange(target, "b d h w -> (b h w) d")
        sure = flat * (4 * self.scale / self.config.entropy_temperature)  # logit of "positive"
        sample_entropy = (F.softplus(sure) - sure * sure.sigmoid()).sum(dim=1).mean()
        shares = self._shares(sure)
        batch_entropy = -(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum()
        weight = self.config.entropy_weight
        return Quantized(target + (vectors - target).detach(), codes, {
            "commit": LossPart(F.mse_loss(target, vectors), self.config.commitment_weight),
            "sample_entropy": LossPart(sample_entropy, weight),
            "batch_entropy": LossPart(batch_entropy, -weight * self.config.diversity_gamma)})

    def _shares(self, sure: Tensor) -> Tensor:
        """Logits [n, D] -> mean soft share of every code [2^(D/2), 2^(D/2)], over all processes in training mode."""
        halves = []
        for part in (sure[:, :self.dim // 2], sure[:, self.dim // 2:]):
            table = torch.ones_like(sure[:, :1])  # [n, 2^bits so far]
            for bit in part.unbind(dim=1):
                pair = torch.stack([(-bit).sigmoid(), bit.sigmoid()], dim=1)  # [n, 2]
                table = (table[:, :, None] * pair[:, None, :]).flatten(1)
            halves.append(table)
        shares = halves[0].T @ halves[1] / max(1, len(sure))
        processes = process_count()
        if self.training and processes > 1:
            everywhere = shares.detach().clone()
            dist.all_reduce(everywhere)
            # gradients are averaged over processes later, so each passes its own in full
            shares = everywhere / processes + (shares - shares.detach())
        return shares

    def _vectors(self, codes: Tensor) -> Tensor:
        return ((codes[..., None] & self.place_values) != 0).float().mul(2).sub(1).mul(self.scale)
