"""VQGANs as plain functions of a state dict, written from the papers of projects without a package.

Independent of our modules: only torch's functions, and the names of the published files.
taming-transformers (Esser et al. 2021, arXiv 2012.09841), LlamaGen (Sun et al. 2024, arXiv
2406.06525).
"""

# Axes: B batch, C channels, S image side, h w code grid, K codebook size, D length of a code vector

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes: ch, ch_mult, num_res_blocks, levels with attention, z_channels, embed_dim, n_embed."""

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)
    z_channels: int = 32
    dim: int = 8
    codes: int = 64
    names: str = "taming"
    quantizer: str = "vq"

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    def down(self, level: int, part: str) -> str:
        if self.names == "taming":
            return f"encoder.down.{level}.{part}"
        return f"encoder.conv_blocks.{level}.{part.replace('block', 'res')}"

    def up(self, level: int, part: str) -> str:
        """taming numbers the decoder's levels as the encoder's, LlamaGen in running order."""
        if self.names == "taming":
            return f"decoder.up.{level}.{part}"
        return f"decoder.conv_blocks.{self.levels - 1 - level}.{part.replace('block', 'res')}"

    def mid(self, side: str, number: int) -> str:
        if self.names == "taming":
            return f"{side}.mid.{('block_1', 'attn_1', 'block_2')[number]}"
        return f"{side}.mid.{number}"


def make_state(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, inner: int, outer: int, side: int) -> None:
        scale = (inner * side * side) ** -0.5
        state[f"{name}.weight"] = torch.randn(outer, inner, side, side, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(outer, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2

    def block(name: str, inner: int, outer: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", inner, outer, 3)
        norm(f"{name}.norm2", outer)
        conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            conv(f"{name}.nin_shortcut", inner, outer, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(side: str, width: int) -> None:
        block(shape.mid(side, 0), width, width)
        attention(shape.mid(side, 1), width)
        block(shape.mid(side, 2), width, width)

    # the order of the calls is the order of the random numbers
    width = shape.channels
    conv("encoder.conv_in", 3, width, 3)
    for level, factor in enumerate(shape.multipliers):
        for index in range(shape.blocks):
            block(shape.down(level, f"block.{index}"), width, shape.channels * factor)
            width = shape.channels * factor
            if level in shape.attention:
                attention(shape.down(level, f"attn.{index}"), width)
        if level < shape.levels - 1:
            conv(shape.down(level, "downsample.conv"), width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, shape.z_channels, 3)
    conv("quant_conv", shape.z_channels, shape.dim, 1)
    conv("post_quant_conv", shape.dim, shape.z_channels, 1)
    conv("decoder.conv_in", shape.z_channels, width, 3)
    middle("decoder", width)
    for level in reversed(range(shape.levels)):
        for index in range(shape.blocks + 1):
            outer = shape.channels * shape.multipliers[level]
            block(shape.up(level, f"block.{index}"), width, outer)
            width = outer
            if level in shape.attention:
                attention(shape.up(level, f"attn.{index}"), width)
        if level:
            conv(shape.up(level, "upsample.conv"), width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    book = "quantize.embedding.weight"
    if shape.quantizer == "gumbel":
        conv("quantize.proj", shape.dim, shape.codes, 1)
        book = "quantize.embed.weight"
    state[book] = torch.randn(shape.codes, shape.dim, generator=generator)
    return state


class Functions:
    """Encode and decode with the tensors of a state dict."""

    def __init__(self, shape: Shape, state: dict[str, Tensor]) -> None:
        self.shape, self.state = shape, {name: tensor.float() for name, tensor in state.items()}

    def conv(self, name: str, hidden: Tensor, **options: int) -> Tensor:
        return F.conv2d(hidden, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        grouped = hidden.reshape(len(hidden), 32, -1)
        mean = grouped.mean(-1, keepdim=True)
        variance = grouped.var(-1, unbiased=False, keepdim=True)
        normed = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(hidden.shape)
        scale, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]  # [C]
        return normed * scale[:, None, None] + bias[:, None, None]

    def swish(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(hidden)

    def block(self, name: str, hidden: Tensor) -> Tensor:
        out = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", hidden)), padding=1)
        out = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", out)), padding=1)
        if f"{name}.nin_shortcut.weight" in self.state:
            hidden = self.conv(f"{name}.nin_shortcut", hidden)
        return hidden + out

    def attention(self, name: str, hidden: Tensor) -> Tensor:
        normed = self.norm(f"{name}.norm", hidden)
        parts = [self.conv(f"{name}.{part}", normed) for part in ("q", "k", "v")]
        query, key, value = (part.flatten(2) for part in parts)  # [B, C, h*w]
        scores = query.transpose(1, 2) @ key * query.shape[1] ** -0.5  # [B, queries, keys]
        weights = scores.softmax(dim=-1)
        mixed = (value @ weights.transpose(1, 2)).reshape(hidden.shape)
        return hidden + self.conv(f"{name}.proj_out", mixed)

    def middle(self, side: str, hidden: Tensor) -> Tensor:
        hidden = self.block(self.shape.mid(side, 0), hidden)
        return self.block(self.shape.mid(side, 2), self.attention(self.shape.mid(side, 1), hidden))

    def latents(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, D, h, w]."""
        shape = self.shape
        hidden = self.conv("encoder.conv_in", image, padding=1)
        for level in range(shape.levels):
            for index in range(shape.blocks):
                hidden = self.block(shape.down(level, f"block.{index}"), hidden)
                if level in shape.attention:
                    hidden = self.attention(shape.down(level, f"attn.{index}"), hidden)
            if level < shape.levels - 1:
                padded = F.pad(hidden, (0, 1, 0, 1))  # a row and a column of zeros, right and below
                hidden = self.conv(shape.down(level, "downsample.conv"), padded, stride=2)

        hidden = self.middle("encoder", hidden)
        hidden = self.swish(self.norm("encoder.norm_out", hidden))
        features = self.conv("encoder.conv_out", hidden, padding=1)
        return self.conv("quant_conv", features)

    def encode(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> codes [B, h, w]."""
        latents = self.latents(image)
        if self.shape.quantizer == "gumbel":
            return self.conv("quantize.proj", latents).argmax(dim=1)
        vectors = latents.permute(0, 2, 3, 1)  # [B, h, w, D]
        book = self.state["quantize.embedding.weight"]  # [K, D]
        if self.shape.names == "llamagen":
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
            book = book / book.norm(dim=-1, keepdim=True)
        return ((vectors[..., None, :] - book) ** 2).sum(-1).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> [B, 3, S, S], unclamped."""
        shape = self.shape
        name = "quantize.embed" if shape.quantizer == "gumbel" else "quantize.embedding"
        book = self.state[f"{name}.weight"]
        if shape.names == "llamagen":
            book = book / book.norm(dim=-1, keepdim=True)
        latents = self.conv("post_quant_conv", book[codes].permute(0, 3, 1, 2))  # [B, C, h, w]
        hidden = self.conv("decoder.conv_in", latents, padding=1)

        hidden = self.middle("decoder", hidden)
        for level in reversed(range(shape.levels)):
            for index in range(shape.blocks + 1):
                hidden = self.block(shape.up(level, f"block.{index}"), hidden)
                if level in shape.attention:
                    hidden = self.attention(shape.up(level, f"attn.{index}"), hidden)
            if level:
                doubled = hidden.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                hidden = self.conv(shape.up(level, "upsample.conv"), doubled, padding=1)
        hidden = self.swish(self.norm("decoder.norm_out", hidden))
        return self.conv("decoder.conv_out", hidden, padding=1)
