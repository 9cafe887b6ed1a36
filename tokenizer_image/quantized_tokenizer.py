"""Tokenizers with a quantizer between encoder and decoder: the shared part of VQGAN and ViT-VQGAN.

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenizer_image.config import QuantizedConfig
from tokenizer_image.image_tokenizer import ImageTokenizer, Reconstruction
from tokenizer_image.quantizers import Quantizer, build_quantizer


class QuantizedTokenizer(ImageTokenizer):
    """latents -> quantizer -> vectors.

    A subclass builds its encoder, calls `add_quantizer`, then builds its decoder: the order decides
    which random numbers initialize which weights.
    """

    config: QuantizedConfig
    quantizer: Quantizer

    def add_quantizer(self) -> None:
        """Build the quantizer of the config."""
        config = self.config
        self.quantizer = build_quantizer(config.embed_dim, config.codebook_size, config.quantizer)

    @property
    def codebook(self) -> Tensor:
        """All code vectors [K, D] float32, or [depth*K, D] with a residual quantizer."""
        return self.quantizer.codebook

    def codes_of(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w/depth] -> codes [B, h, w] int64 in [0, K); changes nothing."""
        return self.quantizer.nearest(latents)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w/depth], in the decoder's dtype."""
        return self.quantizer.lookup(codes).to(self.last_layer.dtype)

    def reconstruct(self, image: Tensor) -> Reconstruction:
        """Forward of a training step; the codebook learns in training mode."""
        quantized = self.quantizer(self.latents(image))
        reconstruction = self.decode_vectors(quantized.vectors)
        return Reconstruction(reconstruction, quantized.codes, quantized.losses)

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        config = self.config.quantizer
        quantizer: dict[str, Any] = {
            "kind": config.kind, "l2_normalize": config.l2_normalize, "depth": config.depth,
            "levels": config.levels, "spherical": config.spherical}
        # only where it is on: one key more would change the fingerprint of every other tokenizer
        if config.raw_search:
            quantizer["raw_search"] = True
        return {**super().code_settings(), "quantizer": quantizer}

    def code_tensors(self) -> dict[str, Tensor]:
        """Tensors that decide codes after the latents, by name."""
        return self.quantizer.code_tensors()

    def code_counts(self) -> Tensor | None:
        """How often each code was found in training, lately [depth, K] float32; None if unknown."""
        return self.quantizer.code_counts()

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Set the quantizer's schedules for training step `step` of `total` -> their values."""
        return self.quantizer.set_step(step, total)

    def take_restarts(self) -> int:
        """Return the number of dead codes restarted since the last call."""
        count = self.quantizer.restarts
        self.quantizer.restarts = 0
        return count

    def take_rewritten(self) -> list[nn.Parameter]:
        """Return the codebooks that k-means or restarts changed in place since the last call."""
        parameters = self.quantizer.rewritten
        self.quantizer.rewritten = []
        return parameters
