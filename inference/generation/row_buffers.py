"""Per-row state of a continuous batch, in buffers that are allocated once."""

# Axes: R rows, N image tokens, T text slots, G key/value heads, d head width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from seq2seq import TextBatch

KEPT_CAPTIONS = 4
"""Captions whose memory is kept for later jobs: often one is drawn again, with other seeds."""
KEPT_UNCONDITIONAL = 4
"""Unconditional texts (the null caption, negative prompts) whose memory is kept likewise."""
KEPT_TEXTS = KEPT_CAPTIONS + KEPT_UNCONDITIONAL


@dataclass
class RowBuffers:
    """All state of R rows. A row is given to the next image when its image ends."""

    cache: SelfCache  # self-attention
    memory: SelfCache | None  # cross-attention (encoder-decoder); `seen` says which slots are text
    tokens: Tensor  # [R, N + 1], the begin slot, then image tokens
    positions: Tensor  # [R], position of the next token
    keys: Tensor  # [R, N], noise keys

    @classmethod
    def allocate(cls, decoder: CachedDecoder, rows: int) -> RowBuffers:
        """Allocate the buffers of `rows` rows of this decoder."""
        config = decoder.config
        cache = decoder.rows_cache(rows)
        memory = None
        if decoder.crosses:
            memory = SelfCache.empty(
                len(decoder.layers), rows, decoder.kv_heads, config.text_length, config.head_dim,
                like=cache.keys, hides=True)
        tokens = torch.full((rows, config.num_tokens + 1), decoder.begin, device=decoder.device)
        positions = torch.zeros_like(tokens[:, 0])
        keys = torch.zeros_like(tokens[:, 1:])
        return cls(cache, memory, tokens, positions, keys)

    def tensors(self) -> list[Tensor]:
        """Return every buffer."""
        buffers = [self.tokens, self.positions, self.keys]
        for cache in (self.cache, self.memory):
            if cache is None:
                continue
            buffers += [cache.keys, cache.values]
            if cache.seen is not None:
                buffers.append(cache.seen)
        return buffers

    def move_row(self, source: int, target: int) -> None:
        """Copy all state of one row over another."""
        self.cache.move_row(source, target)
        if self.memory is not None:
            self.memory.move_row(source, target)
        for buffer in (self.tokens, self.positions, self.keys):
            buffer[target] = buffer[source]

    def put_text(self, decoder: CachedDecoder, groups: list[CaptionMemory], first: int) -> None:
        """Write the text of `groups` into the rows from `first` on, whose caches are cleared.

        Cleared, because attention multiplies hidden slots by zero, and what an earlier image left
        there might not be finite.
        """
        for group in groups:
            cache = self.cache.rows(first, group.rows)
            cache.keys.zero_()
            cache.values.zero_()
            if cache.seen is not None:
                cache.seen.fill_(True)
            decoder.put_text(group, cache)
            if self.memory is not None:
                _put_memory(group, self.memory.rows(first, group.rows))
            first += group.rows

    def caption_memory(self, rows: int, length: int) -> list[CaptionMemory]:
        """Return the first `length` text slots of rows 0 .. rows - 1 as the decoder reads them, one
        caption per row.

        Empty for decoder-only models, whose text is in the self-attention cache.
        """
        if self.memory is None:
            return []
        assert self.memory.seen is not None
        keys = list(self.memory.keys[:, :rows, :, :length])  # one [rows, G, length, d] per layer
        values = list(self.memory.values[:, :rows, :, :length])
        return [CaptionMemory(keys, values, self.memory.seen[:rows, :length], rows, 1)]


def _put_memory(group: CaptionMemory, rows: SelfCache) -> None:
    """Copy a caption's cross-attention keys and values into its rows, and hide all slots after."""
    assert rows.seen is not None
    length = group.keys[0].shape[2]
    for buffer, layers in ((rows.keys, group.keys), (rows.values, group.values)):
        buffer[:, :, :, length:] = 0
        for layer, caption in enumerate(layers):
            buffer[layer, :, :, :length] = caption  # [1, G, T, d], the same for all rows
    rows.seen[:, length:] = False
    rows.seen[:, :length] = True if group.seen is None else group.seen


def text_to(text: TextBatch, device: torch.device) -> TextBatch:
    """Move a text to the decoder's device."""
    return TextBatch(text.text_input.to(device), text.text_mask.to(device))


class KeptTexts:
    """Prefill texts; keep the last `limit` memories for later jobs."""

    def __init__(self, decoder: CachedDecoder, limit: int) -> None:
        self.decoder = decoder
        self.limit = limit
        self._kept: list[tuple[TextBatch, CaptionMemory]] = []  # least recently used first

    def get(self, text: TextBatch) -> CaptionMemory:
        """Return the memory of a text [1, T], prefilled if it is not kept."""
        text = text_to(text, self.decoder.device)
        known: tuple[TextBatch, CaptionMemory] | None = None
        for entry in self._kept:  # by value: each job brings tensors of its own
            if all(map(torch.equal, entry[0], text)):
                known = entry
        if known is None:
            known = text, self.decoder.prefill(text, 1)
        others = [entry for entry in self._kept if entry is not known]
        self._kept = [*others, known][-self.limit:]
        return known[1]


class JobTexts:
    """The texts of jobs, each prefilled once while it is kept."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self.captions = KeptTexts(decoder, KEPT_CAPTIONS)
        self.unconditional = KeptTexts(decoder, KEPT_UNCONDITIONAL)
