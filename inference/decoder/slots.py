"""Positions of a step's rows: cache slots to write, attention masks, rotary factors.

Computed once per step and used by every layer.
- `SharedSlots`: all rows at the same slots, known to Python, so keys and values are written and
  read as slices.
- `RowSlots`: each row at its own slots, known only to tensors: for rows that started at different
  times, for Jacobi windows, and for CUDA graphs, where nothing may depend on a Python number.
"""

# Axes: R rows, s slots per row in this step, H heads, G key/value heads, S slots of the cache,
#       e slots that a step can see, d head width

from __future__ import annotations

import torch
from torch import Tensor

from inference.decoder.kv_cache import SelfCache
from seq2seq.attention import Pattern, alone


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a slot is seen, minus infinity elsewhere.

    Given the bools themselves, attention would build this again in every layer.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf)


def rotary_factors(angles: Tensor | None) -> Tensor | None:
    """Rotary angles [1, S, d], one per number of a head, -> e^(i angle) [S, d/2], one per pair."""
    if angles is None:
        return None
    angles = angles[0, :, ::2]  # each angle stands twice, once for either part of its pair
    return torch.polar(torch.ones_like(angles), angles)


class SharedSlots:
    """Slots first .. first + count - 1 of all rows."""

    def __init__(self, cache: SelfCache, first: int, count: int, rotations: Tensor | None) -> None:
        """rotations: rotary factors [S, d/2] of the whole sequence; None without rotary."""
        self.cache = cache
        self.count = count
        self.first = first
        self.end = first + count
        self.rotations: Tensor | None = None
        if rotations is not None:
            own = rotations[first: self.end]  # [s, d/2]
            if count > 1:
                own = own.repeat(cache.row_count, 1)  # [R * s, d/2]
            self.rotations = own[:, None]  # [R * s or 1, 1, d/2]
        self._masks: dict[Pattern, Tensor | None] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, G, s, d]; return those of all slots so far [R, G, e, d]."""
        cached_keys, cached_values = self.cache.keys[layer], self.cache.values[layer]
        cached_keys[:, :, self.first: self.end] = keys
        cached_values[:, :, self.first: self.end] = values
        return cached_keys[:, :, : self.end], cached_values[:, :, : self.end]

    def mask(self, pattern: Pattern) -> Tensor | None:
        """Additive attention mask [R or 1, 1, s, e]; None if every slot is seen."""
        if pattern not in self._masks:
            seen = self._seen(pattern)
            dtype = self.cache.keys.dtype
            self._masks[pattern] = None if seen is None else additive_mask(seen, dtype)
        return self._masks[pattern]

    def _seen(self, pattern: Pattern) -> Tensor | None:
        real = None if self.cache.seen is None else self.cache.seen[:, : self.end]  # [R, e]
        if self.count == 1 and pattern.name == "full":
            return None if real is None else real[:, None, None]  # one new slot sees all before it

        keys = torch.arange(self.end, device=self.cache.keys.device)
        queries = keys[self.first:, None]
        seen = pattern.sees(queries, keys)[None, None]  # [1, 1, s, e]
        if real is None:
            return seen

        seen = real[:, None, None] & seen  # [R, 1, s, e]
        if self.first < pattern.prefix:
            # padding in front of a caption sees itself, or its softmax would be over nothing
            sees_nothing = alone(real)[:, None, self.first:, None]
            seen = seen | sees_nothing & (queries == keys)
        return seen


class RowSlots:
    """Slots [R, s] int64 of each row, all below `end`."""

    def __init__(self, cache: SelfCache, slots: Tensor, end: int, rotations: Tensor | None) -> None:
        """rotations: rotary factors [S, d/2] of the whole sequence; None without rotary."""
        self.cache = cache
        self.end = end
        self.slots = slots
        self.rotations: Tensor | None = None
        if rotations is not None:
            self.rotations = rotations[slots.flatten()][:, None]  # [R * s, 1, d/2]
        self._masks: dict[Pattern, Tensor] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, G, s, d]; return those of slots below `end` [R, G, e, d]."""
        cached_keys, cached_values = self.cache.keys[layer], self.cache.values[layer]
        target = self.slots[:, None, :, None].expand(keys.shape)  # [R, G, s, d]
        cached_keys.scatter_(2, target, keys)
        cached_values.scatter_(2, target, values)
        return cached_keys[:, :, : self.end], cached_values[:, :, : self.end]

    def mask(self, pattern: Pattern) -> Tensor:
        """Additive attention mask [R, 1, s, e]."""
        if pattern not in self._masks:
            keys = torch.arange(self.end, device=self.slots.device)
            seen = pattern.sees(self.slots[:, None, :, None], keys)
            if self.cache.seen is not None:
                seen = seen & self.cache.seen[:, None, None, : self.end]
            self._masks[pattern] = additive_mask(seen, self.cache.keys.dtype)
        return self._masks[pattern]
