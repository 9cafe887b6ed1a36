"""SimVQ: a frozen random codebook behind one learned linear map (Zhu et al. 2024, arXiv
2411.02038).

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import Quantized, Quantizer
from tokenizer_image.quantizers.gradients import CodeAssignment, pass_gradients, vq_losses
from tokenizer_image.quantizers.search import nearest_codes


class SimVQuantizer(Quantizer):
    """All codes move together with the map, so none dies alone."""

    frozen: Tensor

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__(dim, codebook_size, config)
        frozen = torch.randn(codebook_size, dim) * dim ** -0.5
        self.register_buffer("frozen", frozen)  # [K, D]
        self.map = nn.Linear(dim, dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        """The code vectors [K, D] float32, with gradients to the map."""
        with torch.autocast(self.frozen.device.type, enabled=False):
            return F.linear(self.frozen, self.map.weight.float())

    def search(self, latents: Tensor) -> Tensor:
        """Finite float32 latents [B, D, h, w] -> codes [B, h, w] int64, the lowest on ties."""
        with torch.no_grad():
            return nearest_codes(latents, self.codebook, unit_length=False)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w] float32."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def quantize(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] float32 -> nearest codes. The map learns from the codebook term."""
        codes = self.search(latents)
        assignment = CodeAssignment(latents, self.lookup(codes), codes)
        vectors = pass_gradients(latents, assignment.vectors, self.config.rotation_trick)
        return Quantized(vectors, codes, vq_losses([assignment], self.config))
