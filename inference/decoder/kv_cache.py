"""Keys and values of the decoder: a fixed buffer of self-attention, and those of the captions."""

# Axes: C captions, R rows (an image, or one of its branches under guidance), G key/value heads,
#       S slots of the sequence, T text slots, d head width, D width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SelfCache:
    """Self-attention keys and values [layers, R, G, S, d], allocated once and written in place.

    seen: [R, S] bool, False hides padding; None where nothing is hidden.
    """

    def __init__(self, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> None:
        self.keys = keys
        self.values = values
        self.seen = seen

    @classmethod
    def empty(cls, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, like: Tensor,
              hides: bool = False) -> SelfCache:
        """Allocate a cache of the dtype and device of `like`. hides: some slots may be padding."""
        # zeros: a hidden slot has weight 0, and 0 times uninitialised memory can be NaN
        shape = (layers, rows, kv_heads, slots, head_dim)
        keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        seen = None
        if hides:
            seen = torch.ones(rows, slots, dtype=torch.bool, device=like.device)
        return cls(keys, torch.zeros_like(keys), seen)

    @property
    def row_count(self) -> int:
        """R."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return self.keys.shape[3]

    def rows(self, first: int, count: int) -> SelfCache:
        """Return rows first .. first + count - 1 as a cache that shares their memory."""
        part = slice(first, first + count)
        seen = None if self.seen is None else self.seen[part]
        return SelfCache(self.keys[:, part], self.values[:, part], seen)

    def move_row(self, source: int, target: int) -> None:
        """Overwrite row `target` with row `source`."""
        for buffer in (self.keys, self.values):
            buffer[:, target] = buffer[:, source]
        if self.seen is not None:
            self.seen[target] = self.seen[source]


@dataclass(frozen=True)
class CaptionMemory:
    """One group of rows: `captions` captions, each shared by `images` consecutive rows.

    keys, values: one tensor [captions, G, T, d] per layer, for cross-attention (encoder-decoder) or
        as the text part of the sequence's own attention (decoder-only).
    seen: [captions, T] bool, True = real; None if every slot is real.
    last: outputs [captions, D] of the text's last slot (decoder-only), which predict token 0 in
        models without a begin slot.
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
