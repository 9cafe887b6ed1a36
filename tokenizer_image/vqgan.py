"""VQGAN: image <-> grid of codes with a convolutional encoder and decoder (Esser et al. 2021, arXiv 2012.09841).

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenizer_image.config import VQGANConfig
from tokenizer_image.image_tokenizer import Reconstruction
from tokenizer_image.layers import Decoder, Encoder
from tokenizer_image.quantized_tokenizer import QuantizedTokenizer


class VQGAN(QuantizedTokenizer):
    """The CNN image tokenizer."""

    kind = "vqgan"
    config_class = VQGANConfig
    config: VQGANConfig
    code_parts: tuple[str, ...] = ("encoder", "quant_conv", "quantizer")

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        if config.has_encoder:
            self.encoder = Encoder(config)
            self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        else:
            self.code_parts = ("quantizer",)
        self.add_quantizer()
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the convolution that makes the picture."""
        return self.decoder.conv_out.weight

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""
        if self.config.input_range == "unit":
            image = (image + 1) / 2
        return self.quant_conv(self.encoder(image))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""
        output = self.decoder(self.post_quant_conv(vectors))
        return output * 2 - 1 if self.config.output_range == "unit" else output

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        config, plain = self.config, VQGANConfig()
        # what came later counts only where it differs from what was before, so that fingerprints of before stay
        later = {name: getattr(config, name) for name in ("norm_eps", "input_range")
                 if getattr(config, name) != getattr(plain, name)}
        return {**super().code_settings(), "attention_resolutions": config.attention_resolutions,
                "norm_groups": config.norm_groups, **later}


__all__ = ["VQGAN", "Reconstruction"]
