"""VQGAN: image <-> grid of codes with a convolutional encoder and decoder (Esser et al. 2021, arXiv 2012.09841).

Axes: B batch, H W pixels, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizer_image.config import VQGANConfig
from tokenizer_image.layers import Decoder, Encoder
from tokenizer_image.quantizers import Quantizer
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import PretrainedModule


class Reconstruction(NamedTuple):
    """What training needs: reconstruction [B, 3, H, W] unclamped, codes [B, h, w] int64, commit_loss [], weighted."""

    reconstruction: Tensor
    codes: Tensor
    commit_loss: Tensor


class VQGAN(PretrainedModule):
    """The CNN image tokenizer. `encode` and `decode` are for use, `forward` is for training."""

    kind = "vqgan"
    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.grid = config.grid
        self.num_tokens = config.num_tokens
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantizer = Quantizer(config.embed_dim, config.codebook_size, config.quantizer)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    @property
    def last_layer(self) -> Tensor:
        """The weight that an adaptive adversarial loss compares gradients at."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> codes [B, h, w] int64 in [0, K). Never changes the codebook.

        UserError on another shape or on integers. Call `.eval()` first if the config has dropout.
        """
        self._check_image(image)
        return self.quantizer.nearest(self.latents(image))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> image [B, 3, H, W] in [-1, 1]. UserError on another range, dtype or grid."""
        self._check_codes(codes)
        return self.decode_vectors(self.lookup(codes.long())).clamp(-1.0, 1.0)

    def forward(self, image: Tensor) -> Reconstruction:
        """Image [B, 3, H, W] in [-1, 1] -> reconstruction with gradients. The codebook learns in training mode."""
        self._check_image(image)
        quantized = self.quantizer(self.latents(image))
        return Reconstruction(self.decode_vectors(quantized.vectors), quantized.codes, quantized.commit_loss)

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> latents [B, D, h, w], before quantizing."""
        return self.quant_conv(self.encoder(image))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w], in the dtype that the decoder runs in."""
        return self.quantizer.lookup(codes).to(self.post_quant_conv.weight.dtype)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w] -> image [B, 3, H, W], unclamped, with gradients."""
        return self.decoder(self.post_quant_conv(vectors))

    def _check_image(self, image: Tensor) -> None:
        side = self.config.resolution
        expected = (self.config.in_channels, side, side)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise UserError(f"expected an image [B, {', '.join(map(str, expected))}], got {list(image.shape)}; "
                            "resize it with tokenizer_image.images.image_to_pixels")
        if not image.is_floating_point():
            raise UserError(f"expected a float image in [-1, 1], got {image.dtype}; "
                            "convert it with tokenizer_image.images.pixels_to_float")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
            raise UserError(f"expected integer codes, got {codes.dtype}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != self.grid:
            raise UserError(f"expected codes [B, {self.grid[0]}, {self.grid[1]}], got {list(codes.shape)}; "
                            "fold tokens with tokenizer_image.grid.tokens_to_codes")
        if codes.numel():
            low, high = (int(bound) for bound in torch.aminmax(codes))
            if low < 0 or high >= self.codebook_size:
                raise UserError(f"code {low if low < 0 else high} is outside the codebook: "
                                f"valid codes are 0 to {self.codebook_size - 1}")
