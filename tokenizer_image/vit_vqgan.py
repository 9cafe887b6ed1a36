"""ViT-VQGAN: image <-> grid of codes with a transformer on each side of the codes (Yu et al. 2021, arXiv 2110.04627).

The picture is cut into patches, one code (or `depth` codes) a patch. Pre-norm blocks; a two-layer projection with tanh in
the middle at the end of either side, as the paper has it. Its first layer reads the mlp's width, its second one makes the
code vector: the factorized codes, compared in 32 numbers instead of 512 or more.

Axes: B batch, S pixels of a side, p pixels of a patch's side, h w code grid, N positions (= h * w/depth), W width of a
transformer, H attention heads, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizer_image.config import QuantizedConfig
from tokenizer_image.layers import Checkpointed
from tokenizer_image.quantized_tokenizer import QuantizedTokenizer
from tokenizer_image.quantizer_config import Positive, QuantizerConfig


class ViTVQGANConfig(QuantizedConfig):
    """A ViT-VQGAN; the defaults are the paper's small encoder and small decoder."""

    kind: Literal["vit_vqgan"] = "vit_vqgan"
    codebook_size: int = Field(default=8192, ge=2)
    """K: codes to choose from."""
    embed_dim: Positive = 32
    """Length of a code vector: far below the width, or most codes are never used (the paper's section 3.2)."""
    patch_size: Positive = 8
    """Pixels of a patch's side; 16 makes a quarter of the codes of 8, at a worse picture."""
    encoder_width: Positive = 512
    """Channels of the encoder's tokens; 768 with 12 layers and 12 heads is the paper's base size."""
    encoder_layers: Positive = 8
    """Blocks of the encoder."""
    encoder_heads: Positive = 8
    """Attention heads of the encoder; they share its width."""
    encoder_mlp: Positive = 2048
    """Hidden width of the encoder's two-layer networks."""
    decoder_width: Positive = 512
    """The decoder may be larger than the encoder: Parti trains a large one against the frozen codes of a small model."""
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
        return (self.resolution // self.patch_size, self.resolution // self.patch_size)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resolution % self.patch_size:
            nearest = max(1, round(self.resolution / self.patch_size)) * self.patch_size
            raise ValueError(f"resolution {self.resolution} is not divisible by patch_size {self.patch_size}; use {nearest}")
        for side, width, heads in (("encoder", self.encoder_width, self.encoder_heads),
                                   ("decoder", self.decoder_width, self.decoder_heads)):
            if width % heads:
                raise ValueError(f"{side}_width {width} is not divisible by {side}_heads {heads}; "
                                 f"use a width of {max(1, round(width / heads)) * heads}, or other {side}_heads")
            if width % 4:
                raise ValueError(f"{side}_width {width} is not divisible by 4 (sine and cosine of row and column); "
                                 f"use {max(1, round(width / 4)) * 4}")
        self.quantizer.check_sizes(self.embed_dim, self.codebook_size)
        return self


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows*columns, width] float32, raster order: sines and cosines of the row in the first half, of the column in the second.

    Angles are index / 10000^(i / (width/4)) for i in [0, width/4), as in 1-d transformers (Vaswani et al. 2017, section 3.5).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    row = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)  # [rows, W/4]
    column = torch.outer(torch.arange(columns, dtype=torch.float32), frequencies)
    of_row = torch.cat([row.sin(), row.cos()], dim=1).repeat_interleave(columns, dim=0)  # [N, W/2]
    of_column = torch.cat([column.sin(), column.cos()], dim=1).repeat(rows, 1)
    return torch.cat([of_row, of_column], dim=1)


class TransformerBlock(nn.Module):
    """Attention over all positions, then a two-layer network with GELU, each behind a LayerNorm and a way around.

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
        query, key, value = rearrange(self.qkv(self.norm1(hidden)), "b n (three h w) -> three b h n w", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, N, W/H]
        hidden = hidden + self.proj_out(rearrange(mixed, "b h n w -> b n (h w)"))
        return hidden + self.mlp(self.norm2(hidden))


class Transformer(Checkpointed):
    """Input projection, positions, blocks, norm, and the output projection with tanh in the middle."""

    positions: Tensor

    def __init__(self, sizes: tuple[int, int, int, int], grid: tuple[int, int], inputs: int, outputs: int) -> None:
        """`sizes` are width, layers, heads and mlp. The positions are fixed and not saved: they follow from the config."""
        super().__init__()
        width, layers, heads, mlp = sizes
        self.proj_in = nn.Linear(inputs, width)
        self.register_buffer("positions", sincos_positions(*grid, width), persistent=False)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp) for _ in range(layers))
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
        return self.proj_out(self.head(self.norm_out(hidden)).tanh())  # no activation at the end


class ViTVQGAN(QuantizedTokenizer):
    """The transformer image tokenizer."""

    kind = "vit_vqgan"
    config_class = ViTVQGANConfig
    config: ViTVQGANConfig
    code_parts = ("encoder", "quantizer")

    def __init__(self, config: ViTVQGANConfig) -> None:
        super().__init__(config)
        patch = config.in_channels * config.patch_size**2
        encoder = (config.encoder_width, config.encoder_layers, config.encoder_heads, config.encoder_mlp)
        decoder = (config.decoder_width, config.decoder_layers, config.decoder_heads, config.decoder_mlp)
        self.encoder = Transformer(encoder, config.positions, patch, config.embed_dim)
        self.add_quantizer()
        self.decoder = Transformer(decoder, config.positions, config.embed_dim, patch)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the linear layer that makes the pixels."""
        return self.decoder.proj_out.weight

    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""
        side = self.config.patch_size
        patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)  # [B, N, 3*p*p]
        return rearrange(self.encoder(patches), "b (h w) d -> b d h w", h=self.config.positions[0])

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""
        side = self.config.patch_size
        patches = self.decoder(rearrange(vectors, "b d h w -> b (h w) d"))  # [B, N, 3*p*p]
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=vectors.shape[2], p=side, q=side)

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        return {**super().code_settings(), "patch_size": self.config.patch_size, "encoder_heads": self.config.encoder_heads}


# The paper's codebook: l2-normalised, learned by gradient from a random start, without restarts.
_PAPER = QuantizerConfig(learn_codebook_by_gradient=True, kmeans_init=False, rotation_trick=False, dead_code_fraction=0.0)

VIT_VQGAN_PRESETS: dict[str, ViTVQGANConfig] = {
    "vit-debug": ViTVQGANConfig(
        resolution=16, patch_size=4, codebook_size=64, embed_dim=8, encoder_width=32, encoder_layers=2, encoder_heads=2,
        encoder_mlp=64, decoder_width=32, decoder_layers=2, decoder_heads=2, decoder_mlp=64),
    "vit-vqgan-s": ViTVQGANConfig(quantizer=_PAPER),
    "vit-vqgan-b": ViTVQGANConfig(
        encoder_width=768, encoder_layers=12, encoder_heads=12, encoder_mlp=3072,
        decoder_width=768, decoder_layers=12, decoder_heads=12, decoder_mlp=3072, quantizer=_PAPER),
    # Parti's second stage (arXiv 2206.10789): the large decoder, fine-tuned against the codes of vit-vqgan-s
    "vit-vqgan-l": ViTVQGANConfig(
        decoder_width=1280, decoder_layers=32, decoder_heads=16, decoder_mlp=5120, quantizer=_PAPER),
}
