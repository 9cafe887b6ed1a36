"""The lean decoder's step on the CPU in one call: fills the tables that `inference.decoder.native.kernels` reads, and runs it."""

# Axes: M rows of the stream (R rows x s slots), R rows, s slots at once, D width, H heads, G key/value heads, d head width,
#       S slots, C captions, n images a caption, T text slots, K codebook size

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.decoder.kv_cache import CaptionMemory
from inference.decoder.layers import (
    CrossAttention,
    FeedForward,
    HeadNorm,
    Norm,
    SelfAttention,
    Slots,
)
from inference.decoder.native import tables
from inference.decoder.native.kernels import step_function
from inference.decoder.native.threads import run
from inference.decoder.projection import Projection
from inference.decoder.slots import SharedSlots

if TYPE_CHECKING:
    from inference.decoder.cached_decoder import CachedDecoder

ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: tables.SILU, nn.GELU: tables.GELU}


class NativeStep:
    """Steps of one decoder, float32 or int8. It holds addresses of the decoder's matrices, and belongs to it."""

    def __init__(self, decoder: CachedDecoder) -> None:
        self._config = config = decoder.config
        self._crosses, self._kv_heads, self._slots = decoder.crosses, decoder.kv_heads, decoder.slots
        self._kept: list[Any] = []  # what only addresses point to
        self._patterns: dict[Any, Tensor] = {}
        rows = np.stack([self._layer(*layer) for layer in decoder.layers])
        self._kept.append(rows)
        feed = decoder.layers[0][2]
        step = np.zeros(tables.STEP, dtype=np.int64)
        step[tables.LAYERS], step[tables.LAYER_COUNT] = rows.ctypes.data, len(rows)
        step[tables.WIDTH], step[tables.HEADS], step[tables.KV_HEADS] = config.width, config.heads, decoder.kv_heads
        step[tables.HEAD_DIM], step[tables.CROSSES], step[tables.GATED] = config.head_dim, decoder.crosses, feed.gated
        step[tables.ACTIVATION] = ACTIVATIONS[type(feed.activation)]
        step[tables.INT8] = decoder.to_logits.scale_127 is not None
        self._put_norm(step, tables.FINAL_NORM, decoder.final_norm)
        self._put_matrix(step, tables.TO_LOGITS, decoder.to_logits)
        if decoder.turns is not None:
            step[tables.TURNS] = self._address(torch.view_as_real(decoder.turns).contiguous())
        step[tables.MOST_INPUTS] = max(config.width, config.heads * config.head_dim, feed.out.matrix.shape[1])
        self._step, self._function = step, step_function()
        self._inner = feed.up.matrix.shape[0]

    def __call__(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [M, D], which are written over, and where they are -> logits [M, K]; keys and values go into the cache."""
        step, cache, config = self._step.copy(), slots.cache, self._config
        at = torch.full((len(hidden),), slots.first) if isinstance(slots, SharedSlots) else slots.slots.flatten()
        step[tables.ROWS], step[tables.AT_ONCE], step[tables.AT] = len(hidden), len(hidden) // cache.row_count, at.data_ptr()
        step[tables.KEYS], step[tables.VALUES] = cache.keys.data_ptr(), cache.values.data_ptr()
        step[tables.LAYER_STRIDE], step[tables.ROW_STRIDE], step[tables.SLOTS] = *cache.keys.stride()[:2], cache.slots
        step[tables.SEEN] = 0 if cache.seen is None else cache.seen.data_ptr()
        text = _Text(groups) if self._crosses else None
        if text is not None:
            step[tables.TEXT: tables.TEXT_SEEN + 1] = text.addresses
        count, logits = len(hidden), hidden.new_empty(len(hidden), config.codebook_size)
        heads, each = config.heads * config.head_dim, (config.heads + 2 * self._kv_heads) * config.head_dim
        sizes = [count * each, count * heads, count * self._inner, count * config.width]
        threads, private = torch.get_num_threads(), self._private_numbers(count, max(cache.slots, config.text_length))
        buffer = hidden.new_empty(sum(sizes) + threads * private)
        step[tables.HIDDEN], step[tables.LOGITS] = hidden.data_ptr(), logits.data_ptr()
        starts = buffer.data_ptr() + 4 * np.cumsum([0, *sizes])
        step[tables.HEADS_IN: tables.PRIVATE + 1], step[tables.PRIVATE_BYTES] = starts, 4 * private
        run(self._function.address, step.ctypes.data, threads)
        return logits

    def _private_numbers(self, count: int, scores: int) -> int:
        """Of a thread: a number a row, a row's inputs as they are and in 16 bits, scores; in whole cache lines."""
        most = int(self._step[tables.MOST_INPUTS])
        return -(-(count + count * most + count * (most + 1) // 2 + 1 + scores) // 16) * 16

    def _layer(self, attend: SelfAttention, cross: CrossAttention | None, feed: FeedForward) -> np.ndarray:
        row = np.zeros(tables.LAYER, dtype=np.int64)
        self._put_norm(row, tables.SELF_NORM, attend.norm)
        self._put_matrix(row, tables.QKV, attend.qkv)
        row[tables.SELF_HEADS], row[tables.PATTERN] = self._gains(attend.head_norm), self._pattern(attend.pattern)
        self._put_matrix(row, tables.SELF_OUT, attend.out)
        self._put_norm(row, tables.SELF_AFTER, attend.norm_after)
        if cross is not None:
            self._put_norm(row, tables.CROSS_NORM, cross.norm)
            self._put_matrix(row, tables.CROSS_QUERY, cross.query)
            row[tables.CROSS_HEADS] = self._gains(cross.query_norm)
            self._put_matrix(row, tables.CROSS_OUT, cross.out)
            self._put_norm(row, tables.CROSS_AFTER, cross.norm_after)
        self._put_norm(row, tables.FEED_NORM, feed.norm)
        self._put_matrix(row, tables.FEED_UP, feed.up)
        self._put_norm(row, tables.FEED_INNER, feed.inner_norm)
        self._put_matrix(row, tables.FEED_OUT, feed.out)
        self._put_norm(row, tables.FEED_AFTER, feed.norm_after)
        return row

    def _address(self, tensor: Tensor | None) -> int:
        """Of a tensor that lives as long as this; 0 of None."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _put_norm(self, table: np.ndarray, start: int, norm: Norm | None) -> None:
        if norm is not None:
            table[start + tables.GAIN] = self._address(norm.scaled if norm.rms else norm.gain)
            table[start + tables.NORM_BIAS] = self._address(norm.bias)
            table[start + tables.KIND] = tables.RMS if norm.rms else tables.LAYER_NORM
            epsilon = norm.epsilon * len(norm.gain) if norm.rms else norm.epsilon
            table[start + tables.EPSILON] = np.float32(epsilon).view(np.int32)

    def _put_matrix(self, table: np.ndarray, start: int, projection: Projection) -> None:
        matrix = projection.matrix
        table[start: start + tables.MATRIX] = (
            self._address(matrix), self._address(projection.scale_127), self._address(projection.bias), *matrix.shape)

    def _gains(self, norm: HeadNorm | None) -> int:
        return 0 if norm is None else self._address(norm.scaled)

    def _pattern(self, pattern: Any) -> int:
        """The address of [S, S] bytes; 0 where every slot sees all before it."""
        if pattern.name == "full":
            return 0
        if pattern not in self._patterns:
            self._patterns[pattern] = pattern.mask(self._slots)
        return self._address(self._patterns[pattern])


class _Text:
    """Where each row's caption is: what the table of a step says from TEXT on."""

    def __init__(self, groups: list[CaptionMemory]) -> None:
        rows = sum(group.rows for group in groups)
        layers = len(groups[0].keys)
        text = np.empty((layers, 2, rows), dtype=np.int64)
        sizes = np.zeros((3, rows), dtype=np.int64)  # T, numbers between heads, addresses of what is seen
        start = 0
        for group in groups:
            part = slice(start, start + group.rows)
            caption = np.arange(group.captions).repeat(group.images)
            shape, stride = group.keys[0].shape, group.keys[0].stride()
            for which, tensors in enumerate((group.keys, group.values)):
                addresses = np.array([tensor.data_ptr() for tensor in tensors])
                text[:, which, part] = addresses[:, None] + caption * stride[0] * 4
            sizes[0, part], sizes[1, part] = shape[2], stride[1]
            if group.seen is not None:
                sizes[2, part] = group.seen.data_ptr() + caption * group.seen.stride(0)
            start += group.rows
        self._kept = text, sizes
        self.addresses = [text.ctypes.data, *(part.ctypes.data for part in sizes)]
