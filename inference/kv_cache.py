"""Keys and values of the decoder: self-attention in a buffer of fixed size written in place, the caption's once a caption."""

# Axes: C captions, B rows (pictures), G key/value heads, S slots of the sequence, T text slots, d head width, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SelfCache:
    """Keys and values [layers, B, G, S, d], allocated once and written at a slot; seen [B, S] bool hides padding, or None."""

    def __init__(self, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, like: Tensor) -> None:
        shape = (layers, rows, kv_heads, slots, head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.seen: Tensor | None = None

    def write(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, G, s, d] at `slot` and on -> keys and values [B, G, slot + s, d] up to and with them."""
        end = slot + keys.shape[2]
        self.keys[layer, :, :, slot:end] = keys
        self.values[layer, :, :, slot:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass(frozen=True)
class CaptionMemory:
    """One group of rows: `captions` captions, each shared by `images` consecutive rows.

    keys, values: one tensor [captions, G, T, d] a layer: the caption's in cross-attention (encoder-decoder) or in the
    sequence's own attention (decoder-only). seen [captions, T] bool, True = real; None where all are.
    last: outputs [captions, D] of the text's last slot (decoder-only), which predict token 0 where no begin slot does.
    """

    keys: list[Tensor]
    values: list[Tensor]
    seen: Tensor | None
    captions: int
    images: int
    last: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch that belong to this group."""
        return self.captions * self.images
