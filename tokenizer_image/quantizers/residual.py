"""Residual quantization: several codes per position, each for the remainder of the ones before.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import Quantized, Quantizer
from tokenizer_image.quantizers.gradients import pass_gradients, vq_losses
from tokenizer_image.quantizers.vector import VectorQuantizer


class ResidualQuantizer(Quantizer):
    """`depth` codebooks: the first for the latent, each further one for the residual (Lee et al.
    2022, arXiv 2203.01941).

    The codes of a position are adjacent in its row: [B, h, w, depth] is folded to [B, h, w*depth].
    In raster order a transformer then predicts all depths of a position, coarse to fine, before the
    next position.
    """

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        # not l2_normalize: a residual has no unit length
        layer_config = config.model_copy(update={"kind": "vq", "l2_normalize": False, "depth": 1})
        self.layers = nn.ModuleList(
            VectorQuantizer(dim, codebook_size, layer_config) for _ in range(config.depth))

    @property
    def _by_depth(self) -> list[VectorQuantizer]:
        return cast("list[VectorQuantizer]", list(self.layers))

    @property
    def codebook(self) -> Tensor:
        """The code vectors of all depths [depth*K, D] float32."""
        return torch.cat([layer.codebook for layer in self._by_depth])

    def code_counts(self) -> Tensor | None:
        """The moving averages of all depths [depth, K]; None where they are unknown."""
        counts = [layer.code_counts() for layer in self._by_depth]
        known = [one for one in counts if one is not None]
        return torch.cat(known) if len(known) == len(counts) else None

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w*depth] int64, depth by depth."""
        residual = latents
        codes = []
        for layer in self._by_depth:
            layer_codes = layer.search(residual)
            residual = residual - layer.lookup(layer_codes)
            codes.append(layer_codes)
        return _fold_depths(codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w*depth] in [0, K) -> the sum of their vectors [B, D, h, w] float32."""
        by_depth = rearrange(codes, "b h (w depth) -> depth b h w", depth=len(self.layers))
        vectors = [layer.lookup(part) for layer, part in zip(self._by_depth, by_depth, strict=True)]
        return torch.stack(vectors).sum(dim=0)

    def quantize(self, latents: Tensor) -> Quantized:
        """Quantize as VectorQuantizer does, depth by depth; loss terms are means over depths."""
        residual = latents
        total = torch.zeros_like(latents)
        assignments = []
        for layer in self._by_depth:
            assignment = layer.assign(residual)
            vectors = assignment.vectors.detach()
            residual = residual - vectors
            total = total + vectors
            assignments.append(assignment)
        self._collect_from_layers()

        # Once, from the sum to the latents: passed at every depth, as in the library, gradients
        # would add up to `depth` times what they are.
        vectors = pass_gradients(latents, total, self.config.rotation_trick)
        codes = _fold_depths([assignment.codes for assignment in assignments])
        return Quantized(vectors, codes, vq_losses(assignments, self.config))

    def _collect_from_layers(self) -> None:
        """Move restart counts and rewritten parameters from the layers to this module."""
        for layer in self._by_depth:
            self.restarts += layer.restarts
            layer.restarts = 0
            for parameter in layer.rewritten:
                self.mark_rewritten(parameter)
            layer.rewritten = []


def _fold_depths(codes: list[Tensor]) -> Tensor:
    """Codes [B, h, w] of each depth -> [B, h, w*depth]."""
    return rearrange(torch.stack(codes), "depth b h w -> b h (w depth)")
