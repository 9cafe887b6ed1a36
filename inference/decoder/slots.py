"""Where the rows of a step are in their sequences: which slots of the cache they write, what they see, how they turn.

Worked out once a step, used by every layer. `SharedSlots`: all rows at the same slots, known to Python: keys and values are
written and read as slices. `RowSlots`: each row at slots of its own, known to tensors alone: for rows that began at different
times, for windows, and for CUDA graphs, where nothing may depend on a number that Python sees.
"""

# Axes: R rows, s slots at once, H heads, G key/value heads, S slots of the cache, e slots that a step can see, d head width

from __future__ import annotations

import torch
from torch import Tensor

from inference.decoder.kv_cache import SelfCache
from seq2seq.attention import Pattern, alone


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a slot is seen and minus infinity elsewhere: what attention makes of bools anew in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


class SharedSlots:
    """Slots first .. first + count - 1 of all rows."""

    def __init__(self, cache: SelfCache, first: int, count: int, turns: Tensor | None) -> None:
        self.cache, self.count = cache, count
        self.first, self.end = first, first + count
        self.turns = None
        if turns is not None:
            own = turns[first: self.end]  # [s, d/2]
            self.turns = own[:, None] if count == 1 else own.repeat(cache.row_count, 1)[:, None]  # [R * s or 1, 1, d/2]
        self._masks: dict[Pattern, Tensor | None] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [R, G, s, d] -> keys and values [R, G, e, d] of all slots up to these."""
        kept = self.cache.keys[layer], self.cache.values[layer]
        for buffer, new in zip(kept, (keys, values), strict=True):
            buffer[:, :, self.first: self.end] = new
        return kept[0][:, :, : self.end], kept[1][:, :, : self.end]

    def mask(self, pattern: Pattern) -> Tensor | None:
        """What is added to the scores of each of these, [R or 1, 1, s, e]; None where all slots are seen."""
        if pattern not in self._masks:
            seen = None if self.cache.seen is None else self.cache.seen[:, None, None, : self.end]
            if self.count > 1 or pattern.name != "full":
                device = self.cache.keys.device
                keys = torch.arange(self.end, device=device)
                queries = keys[self.first:, None]
                own = pattern.sees(queries, keys)[None, None]
                seen = own if seen is None else seen & own
                if self.cache.seen is not None and self.first < pattern.prefix:
                    hidden = alone(self.cache.seen[:, : self.end])[:, None, self.first:, None]
                    seen = seen | hidden & (queries == keys)
            self._masks[pattern] = None if seen is None else added(seen, self.cache.keys.dtype)
        return self._masks[pattern]


class RowSlots:
    """Slots [R, s] int64 of each row, all below `end`."""

    def __init__(self, cache: SelfCache, slots: Tensor, end: int, turns: Tensor | None) -> None:
        self.cache, self.end, self.slots = cache, end, slots
        self.turns = None if turns is None else turns[slots.flatten()][:, None]  # [R * s, 1, d/2]
        self._masks: dict[Pattern, Tensor] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [R, G, s, d] -> keys and values [R, G, e, d]."""
        kept = self.cache.keys[layer], self.cache.values[layer]
        where = self.slots[:, None, :, None].expand(keys.shape)  # [R, G, s, d]
        for buffer, new in zip(kept, (keys, values), strict=True):
            buffer.scatter_(2, where, new)
        return kept[0][:, :, : self.end], kept[1][:, :, : self.end]

    def mask(self, pattern: Pattern) -> Tensor:
        """What is added to the scores of each of these, [R, 1, s, e]."""
        if pattern not in self._masks:
            seen = pattern.sees(self.slots[:, None, :, None], torch.arange(self.end, device=self.slots.device))
            if self.cache.seen is not None:
                seen = seen & self.cache.seen[:, None, None, : self.end]
            self._masks[pattern] = added(seen, self.cache.keys.dtype)
        return self._masks[pattern]
