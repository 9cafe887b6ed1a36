"""Residual quantization: several codes per position."""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import (
    Quantized,
    Quantizer,
)
from tokenizer_image.quantizers.vector import VectorQuantizer, _loss_parts, _pass_gradients


class ResidualQuantizer(Quantizer):
    """`depth` codebooks: the first for the latent, each further one for what is left (Lee et al. 2022, arXiv 2203.01941).

    The codes of a position follow one another in its row: [B, h, w, depth] is folded to [B, h, w*depth], so that in raster
    order a transformer predicts all depths of a position, coarse to fine, before the next position.
    """

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        one = config.model_copy(update={"kind": "vq", "l2_normalize": False, "depth": 1})  # what is left has no unit length
        self.layers = nn.ModuleList(VectorQuantizer(dim, codebook_size, one) for _ in range(config.depth))

    @property
    def _by_depth(self) -> list[VectorQuantizer]:
        return cast("list[VectorQuantizer]", list(self.layers))

    @property
    def codebook(self) -> Tensor:
        """The code vectors of all depths [depth*K, D] float32."""
        return torch.cat([layer.codebook for layer in self._by_depth])

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w*depth] int64 in [0, K), greedily depth by depth."""
        left, codes = latents, []
        for layer in self._by_depth:
            codes.append(layer.search(left))
            left = left - layer.lookup(codes[-1])
        return self._fold(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w*depth] in [0, K) -> the sum of their vectors [B, D, h, w] float32."""
        by_depth = rearrange(codes, "b h (w depth) -> depth b h w", depth=len(self.layers))
        return torch.stack([layer.lookup(part) for layer, part in zip(self._by_depth, by_depth, strict=True)]).sum(dim=0)

    def quantize(self, latents: Tensor) -> Quantized:
        """As VectorQuantizer.quantize, depth by depth; loss terms are means over the depths.

        Gradients are passed once, from the sum to the latents. Passed at every depth, as in the library, they would add up
        to `depth` times the gradient.
        """
        left, total, choices = latents, torch.zeros_like(latents), []
        for layer in self._by_depth:
            choice = layer.choose(left)
            choices.append(choice)
            left = left - choice.vectors.detach()
            total = total + choice.vectors.detach()
        self._collect()
        vectors = _pass_gradients(latents, total, self.config.rotation_trick)
        return Quantized(vectors, self._fold([choice.codes for choice in choices]), _loss_parts(choices, self.config))

    def _collect(self) -> None:
        for layer in self._by_depth:
            self.restarts, layer.restarts = self.restarts + layer.restarts, 0
            for parameter in layer.rewritten:
                self.mark_rewritten(parameter)
            layer.rewritten = []

    def _fold(self, codes: list[Tensor]) -> Tensor:
        return rearrange(torch.stack(codes), "depth b h w -> b h (w depth)")
