"""Keys and values of the decoder: self-attention in a buffer of fixed size written in place, the caption's once a caption."""

# Axes: C captions, R rows (a picture, or one of its branches under guidance), G key/value heads, S slots of the sequence,
#       T text slots, d head width, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SelfCache:
    """Keys and values [layers, R, G, S, d], allocated once; seen [R, S] bool hides padding, or None where nothing is hidden."""

    def __init__(self, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> None:
        self.keys, self.values, self.seen = keys, values, seen

    @classmethod
    def empty(cls, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, like: Tensor,
              hides: bool = False) -> SelfCache:
        """For `rows` rows of `slots` slots, in the type and on the device of `like`; hides: some slots may be padding."""
        keys = torch.zeros(layers, rows, kv_heads, slots, head_dim, dtype=like.dtype, device=like.device)
        seen = torch.ones(rows, slots, dtype=torch.bool, device=like.device) if hides else None
        return cls(keys, torch.zeros_like(keys), seen)  # zeros: a hidden slot has weight 0, and 0 times what lay there is NaN

    @property
    def row_count(self) -> int:
        """R."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[3]

    def rows(self, first: int, count: int) -> SelfCache:
        """Some of the rows; shares their memory."""
        part = slice(first, first + count)
        return SelfCache(self.keys[:, part], self.values[:, part], None if self.seen is None else self.seen[part])

    def move_row(self, source: int, target: int) -> None:
        """Copy all of a row over another."""
        for buffer in (self.keys, self.values):
            buffer[:, target] = buffer[:, source]
        if self.seen is not None:
            self.seen[target] = self.seen[source]


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
