"""All that the rows of a batch keep, in buffers allocated once: a row's place is given to the next picture when it ends."""

# Axes: R rows, N image tokens, T text slots, G key/value heads, d head width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache


@dataclass
class RowBuffers:
    """All that rows keep, allocated once. tokens: the begin slot, then image tokens."""

    cache: SelfCache
    memory: SelfCache | None  # the captions', for cross-attention; `seen` says what is text
    tokens: Tensor  # [R, N + 1]
    positions: Tensor  # [R]
    keys: Tensor  # [R, N] of the noise

    @classmethod
    def of(cls, decoder: CachedDecoder, rows: int) -> RowBuffers:
        """For `rows` rows of this decoder."""
        config, cache = decoder.config, decoder.rows_cache(rows)
        memory = None
        if decoder.crosses:
            memory = SelfCache.empty(len(decoder.layers), rows, decoder.kv_heads, config.text_length, config.head_dim,
                                     cache.keys, hides=True)
        tokens = torch.full((rows, config.num_tokens + 1), decoder.begin, device=decoder.device)
        return cls(cache, memory, tokens, torch.zeros_like(tokens[:, 0]), torch.zeros_like(tokens[:, 1:]))

    def tensors(self) -> list[Tensor]:
        """All of them."""
        kept = [self.tokens, self.positions, self.keys]
        for part in (self.cache, self.memory):
            kept += [] if part is None else [part.keys, part.values]
            kept += [] if part is None or part.seen is None else [part.seen]
        return kept

    def move_row(self, source: int, target: int) -> None:
        """Copy all of a row over another."""
        self.cache.move_row(source, target)
        if self.memory is not None:
            self.memory.move_row(source, target)
        for buffer in (self.tokens, self.positions, self.keys):
            buffer[target] = buffer[source]

    def put_text(self, decoder: CachedDecoder, groups: list[CaptionMemory], first: int) -> None:
        """The text of `groups` into the rows from `first` on, which are cleared: attention multiplies what it does not see by
        zero, and what was there before might not be finite."""
        for group in groups:
            own = self.cache.rows(first, group.rows)
            for buffer in (own.keys, own.values):
                buffer.zero_()
            if own.seen is not None:
                own.seen.fill_(True)
            decoder.put_text(group, own)
            if self.memory is not None:
                _put_memory(group, self.memory.rows(first, group.rows))
            first += group.rows

    def caption_memory(self, rows: int, length: int) -> list[CaptionMemory]:
        """The first `length` slots of text of rows 0 .. rows - 1 as the decoder reads them, one caption a row. No group where
        text is part of the sequence."""
        if self.memory is None:
            return []
        keys, values = (list(part[:, :rows, :, :length]) for part in (self.memory.keys, self.memory.values))
        assert self.memory.seen is not None
        return [CaptionMemory(keys, values, self.memory.seen[:rows, :length], rows, 1)]


def _put_memory(group: CaptionMemory, rows: SelfCache) -> None:
    """A caption's keys and values into the buffers of its rows, nothing after them."""
    length = group.keys[0].shape[2]
    for buffer, parts in ((rows.keys, group.keys), (rows.values, group.values)):
        buffer[:, :, :, length:] = 0
        for layer, part in enumerate(parts):
            buffer[layer, :, :, :length] = part  # [1, G, T, d] for all
    assert rows.seen is not None
    rows.seen[:, length:] = False
    rows.seen[:, :length] = True if group.seen is None else group.seen
