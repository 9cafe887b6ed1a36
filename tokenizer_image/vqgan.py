"""CNN image tokenizer: image <-> grid of codes (VQGAN, Esser et al. 2021, arXiv 2012.09841).

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenizer_image.config import VQGANConfig
from tokenizer_image.layers import Decoder, Encoder
from tokenizer_image.quantized_tokenizer import QuantizedTokenizer


class VQGAN(QuantizedTokenizer):
    """Convolutional encoder, quantizer, convolutional decoder."""

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
        """The weight of the convolution that makes the pixels."""
        return self.decoder.conv_out.weight

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""
        if self.config.input_range == "unit":
            image = (image + 1) / 2
        return self.quant_conv(self.encoder(image))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""
        image = self.decoder(self.post_quant_conv(vectors))
        if self.config.output_range == "unit":
            image = image * 2 - 1
        return image

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        settings = {**super().code_settings(),
                    "attention_resolutions": self.config.attention_resolutions,
                    "norm_groups": self.config.norm_groups}
        # left out at their defaults: a key more would change every other tokenizer's fingerprint
        for name in ("norm_eps", "input_range"):
            value = getattr(self.config, name)
            if value != VQGANConfig.model_fields[name].default:
                settings[name] = value
        return settings
