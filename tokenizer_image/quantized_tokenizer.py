"""Tokenizers with a quantizer between encoder and decoder: what VQGAN and ViT-VQGAN share.

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenizer_image.config import QuantizedConfig
from tokenizer_image.image_tokenizer import ImageTokenizer, Reconstruction
from tokenizer_image.quantizers import Quantizer, build_quantizer


class QuantizedTokenizer(ImageTokenizer):
    """latents -> quantizer -> vectors. A subclass builds its encoder, calls `add_quantizer`, then builds its decoder."""

    config: QuantizedConfig
    quantizer: Quantizer

    def add_quantizer(self) -> None:
        """Build the quantizer that the config describes."""
        self.quantizer = build_quantizer(self.config.embed_dim, self.config.codebook_size, self.config.quantizer)

    @property
    def codebook(self) -> Tensor:
        """All code vectors [K, D] float32, or [depth*K, D] with a residual quantizer."""
        return self.quantizer.codebook

    def codes_of(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w/depth] -> codes [B, h, w] int64 in [0, K); changes nothing."""
        return self.quantizer.nearest(latents)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w/depth], in the dtype that the decoder runs in."""
        return self.quantizer.lookup(codes).to(self.last_layer.dtype)

    def reconstruct(self, image: Tensor) -> Reconstruction:
        """A training step's forward, with gradients everywhere; the codebook learns in training mode."""
        quantized = self.quantizer(self.latents(image))
        return Reconstruction(self.decode_vectors(quantized.vectors), quantized.codes, quantized.losses)

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        quantizer = self.config.quantizer
        later = {"raw_search": True} if quantizer.raw_search else {}  # only where it is on: fingerprints of before stay
        return {**super().code_settings(), "quantizer": {
            "kind": quantizer.kind, "l2_normalize": quantizer.l2_normalize, "depth": quantizer.depth,
            "levels": quantizer.levels, "spherical": quantizer.spherical, **later}}

    def code_tensors(self) -> dict[str, Tensor]:
        """What decides codes after the latents, by name."""
        return self.quantizer.code_tensors()

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Tell the model which of `total` training steps comes next -> the quantizer's schedules, for the log."""
        return self.quantizer.set_step(step, total)

    def take_restarts(self) -> int:
        """Dead codes that were restarted since this was last asked."""
        count, self.quantizer.restarts = self.quantizer.restarts, 0
        return count

    def take_rewritten(self) -> list[nn.Parameter]:
        """Codebooks changed in place by k-means or restarts since this was last asked."""
        taken, self.quantizer.rewritten = self.quantizer.rewritten, []
        return taken
