"""Transformer image tokenizer: image <-> grid of codes (ViT-VQGAN, Yu et al. 2021, arXiv
2110.04627).

The image is cut into patches, one code (or `depth` codes) per patch. Encoder and decoder are
pre-norm transformers that end, as in the paper, in a two-layer projection with tanh in the middle.
The encoder's makes the factorized codes: compared in 32 numbers instead of 512 or more.

Axes: B batch, S pixels of a side, p pixels of a patch's side, h w code grid, N positions
(= h * w/depth), W width of a transformer, H attention heads, D length of a code vector, K codebook
size.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizer_image.config import AS_RELEASED, QuantizedConfig, nearest_multiple
from tokenizer_image.layers import Checkpointed
from tokenizer_image.quantized_tokenizer import QuantizedTokenizer
from tokenizer_image.quantizer_config import Positive, QuantizerConfig


class ViTVQGANConfig(QuantizedConfig):
    """A ViT-VQGAN; the defaults are the paper's small encoder and small decoder."""

    kind: Literal["vit_vqgan"] = "vit_vqgan"
    codebook_size: int = Field(default=8192, ge=2)
    """K: codes to choose from."""
    embed_dim: Positive = 32
    """Length of a code vector; far below the width, or most codes are never used (section 3.2)."""
    patch_size: Positive = 8
    """Pixels of a patch's side; 16 gives a quarter of the codes of 8, and a worse image."""
    encoder_width: Positive = 512
    """Channels of the encoder's tokens. The paper's base size: 768, 12 layers, 12 heads."""
    encoder_layers: Positive = 8
    """Blocks of the encoder."""
    encoder_heads: Positive = 8
    """Attention heads of the encoder; they share its width."""
    encoder_mlp: Positive = 2048
    """Hidden width of the encoder's two-layer networks."""
    decoder_width: Positive = 512
    """Channels of the decoder's tokens. The decoder may be larger than the encoder: Parti trains a
    large one against the frozen codes of a small model."""
    decoder_layers: Positive = 8
    """Blocks of the decoder."""
    decoder_heads: Positive = 8
    """Attention heads of the decoder; they share its width."""
    decoder_mlp: Positive = 2048
    """Hidden width of the decoder's two-layer networks."""

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the patch."""
        return self.patch_size

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of patches: the code grid without a residual quantizer's depth."""
        side = self.resolution // self.patch_size
        return (side, side)

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.resolution % self.patch_size:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by patch_size {self.patch_size}; "
                f"use {nearest_multiple(self.resolution, self.patch_size)}")
        _check_width("encoder", self.encoder_width, self.encoder_heads)
        _check_width("decoder", self.decoder_width, self.decoder_heads)
        self.quantizer.check_sizes(self.embed_dim, self.codebook_size)
        return self


def _check_width(side: str, width: int, heads: int) -> None:
    """Raise ValueError if `side` (encoder or decoder) cannot have this width."""
    if width % heads:
        raise ValueError(
            f"{side}_width {width} is not divisible by {side}_heads {heads}; "
            f"use a width of {nearest_multiple(width, heads)}, or other {side}_heads")
    if width % 4:
        raise ValueError(
            f"{side}_width {width} is not divisible by 4 (sine and cosine of row and column); "
            f"use {nearest_multiple(width, 4)}")


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Return fixed position embeddings [rows*columns, width] float32, in raster order.

    Sines and cosines of the row in the first half, of the column in the second. Angles are index /
    10000^(i / (width/4)) for i in [0, width/4), as in 1-d transformers (Vaswani et al. 2017,
    section 3.5).
    """
    count = width // 4
    exponents = torch.arange(count, dtype=torch.float32) / count
    frequencies = 10000.0 ** -exponents  # [W/4]

    per_row = _sines_and_cosines(rows, frequencies)
    per_column = _sines_and_cosines(columns, frequencies)
    row_half = per_row.repeat_interleave(columns, dim=0)  # [N, W/2]
    column_half = per_column.repeat(rows, 1)
    return torch.cat([row_half, column_half], dim=1)


def _sines_and_cosines(count: int, frequencies: Tensor) -> Tensor:
    """[W/4] -> [count, W/2]."""
    angles = torch.outer(torch.arange(count, dtype=torch.float32), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention over all positions, then a two-layer network with GELU.

    Queries, keys and values have no biases: a key's would have no effect at all.
    """

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        qkv = self.qkv(self.norm1(hidden))  # [B, N, 3*W]
        query, key, value = rearrange(
            qkv, "b n (three h w) -> three b h n w", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, N, W/H]
        mixed = rearrange(mixed, "b h n w -> b n (h w)")
        hidden = hidden + self.proj_out(mixed)
        return hidden + self.mlp(self.norm2(hidden))


class TransformerSizes(NamedTuple):
    """Sizes of one side of the tokenizer."""

    width: int
    layers: int
    heads: int
    mlp: int


class Transformer(Checkpointed):
    """Input projection, positions, blocks, norm, and output projection with tanh in the middle."""

    positions: Tensor

    def __init__(self, sizes: TransformerSizes, grid: tuple[int, int], inputs: int,
                 outputs: int) -> None:
        super().__init__()
        width, mlp = sizes.width, sizes.mlp
        self.proj_in = nn.Linear(inputs, width)
        # not saved, as they follow from the config
        self.register_buffer("positions", sincos_positions(*grid, width), persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, sizes.heads, mlp) for _ in range(sizes.layers))
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, mlp)
        self.proj_out = nn.Linear(mlp, outputs)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, inputs] -> [B, N, outputs]."""
        hidden = self.proj_in(tokens) + self.positions
        for block in self.blocks:
            hidden = self.run(block, hidden)
        features = self.head(self.norm_out(hidden)).tanh()
        return self.proj_out(features)


class ViTVQGAN(QuantizedTokenizer):
    """Transformer encoder, quantizer, transformer decoder."""

    kind = "vit_vqgan"
    config_class = ViTVQGANConfig
    config: ViTVQGANConfig
    code_parts = ("encoder", "quantizer")

    def __init__(self, config: ViTVQGANConfig) -> None:
        super().__init__(config)
        patch_values = config.in_channels * config.patch_size**2
        encoder = TransformerSizes(config.encoder_width, config.encoder_layers,
                                   config.encoder_heads, config.encoder_mlp)
        decoder = TransformerSizes(config.decoder_width, config.decoder_layers,
                                   config.decoder_heads, config.decoder_mlp)
        self.encoder = Transformer(encoder, config.positions, patch_values, config.embed_dim)
        self.add_quantizer()
        self.decoder = Transformer(decoder, config.positions, config.embed_dim, patch_values)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the linear layer that makes the pixels."""
        return self.decoder.proj_out.weight

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""
        side = self.config.patch_size
        rows, _ = self.config.positions
        patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
        vectors = self.encoder(patches)  # [B, N, D]
        return rearrange(vectors, "b (h w) d -> b d h w", h=rows)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""
        side = self.config.patch_size
        rows = vectors.shape[2]
        patches = self.decoder(rearrange(vectors, "b d h w -> b (h w) d"))  # [B, N, 3*p*p]
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=side, q=side)

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        return {**super().code_settings(), "patch_size": self.config.patch_size,
                "encoder_heads": self.config.encoder_heads}


# The paper's codebook: l2-normalized, learned by gradient from a random start, without restarts.
_PAPER = QuantizerConfig(**AS_RELEASED)

VIT_VQGAN_PRESETS: dict[str, ViTVQGANConfig] = {
    "vit-debug": ViTVQGANConfig(
        resolution=16, patch_size=4, codebook_size=64, embed_dim=8,
        encoder_width=32, encoder_layers=2, encoder_heads=2, encoder_mlp=64,
        decoder_width=32, decoder_layers=2, decoder_heads=2, decoder_mlp=64),
    "vit-vqgan-s": ViTVQGANConfig(quantizer=_PAPER),
    "vit-vqgan-b": ViTVQGANConfig(
        encoder_width=768, encoder_layers=12, encoder_heads=12, encoder_mlp=3072,
        decoder_width=768, decoder_layers=12, decoder_heads=12, decoder_mlp=3072,
        quantizer=_PAPER),
    # Parti's second stage (arXiv 2206.10789): a large decoder for the codes of vit-vqgan-s
    "vit-vqgan-l": ViTVQGANConfig(
        decoder_width=1280, decoder_layers=32, decoder_heads=16, decoder_mlp=5120,
        quantizer=_PAPER),
}
