"""Keys and values of the decoder: self-attention in a buffer of fixed size written in place, cross-attention once a caption."""

# Axes: L layers, B rows (pictures), G key/value heads, N image tokens, T text ids, d head width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SelfCache:
    """Keys and values [L, B, G, N, d], allocated once and written at a position."""

    def __init__(self, layers: int, rows: int, kv_heads: int, length: int, head_dim: int, like: Tensor) -> None:
        shape = (layers, rows, kv_heads, length, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    def write(self, layer: int, position: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, G, 1, d] at `position` -> keys and values [B, G, position+1, d] up to and with it."""
        self.keys[layer, :, :, position] = keys[:, :, 0]
        self.values[layer, :, :, position] = values[:, :, 0]
        return self.keys[layer, :, :, : position + 1], self.values[layer, :, :, : position + 1]


@dataclass(frozen=True)
class CaptionMemory:
    """Cross-attention of one group of rows: `captions` captions, each shared by `images` consecutive rows.

    keys, values: one tensor [captions, G, T, d] a layer; mask [captions, 1, 1, T] bool, True = real.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    captions: int
    images: int

    @property
    def rows(self) -> int:
        """Rows of the batch that belong to this group."""
        return self.captions * self.images
