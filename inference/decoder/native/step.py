"""The serving decoder's step on the CPU in one call: fill the tables of `kernels`, run it."""

# Axes: M rows of the stream (R rows x s slots), R rows, s slots per row in this step, D width,
#       H heads, G key/value heads, d head width, S slots, C captions, n images per caption,
#       T text slots, K codebook size

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.decoder.layers import HeadNorm, Layer, Norm, Slots
from inference.decoder.native import tables
from inference.decoder.native.kernels import step_function
from inference.decoder.native.scratch import scratch_numbers
from inference.decoder.native.threads import run
from inference.decoder.projection import Projection
from inference.decoder.slots import SharedSlots

ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: tables.SILU, nn.GELU: tables.GELU}


class StepSource(Protocol):
    """The parts of a decoder that a native step is made from."""

    config: Any
    kv_heads: int
    crosses: bool
    layers: list[Layer]
    final_norm: Norm
    to_logits: Projection
    rotations: Tensor | None

    @property
    def slots(self) -> int:
        """S."""
        ...


class NativeStep:
    """Compiled steps of one decoder, float32 or int8.

    The tables hold addresses of the decoder's matrices, so a NativeStep must not outlive its
    decoder.
    """

    def __init__(self, decoder: StepSource) -> None:
        self._config = decoder.config
        self._kv_heads = decoder.kv_heads
        self._crosses = decoder.crosses
        self._slots = decoder.slots
        self._kept: list[Any] = []  # tensors and arrays that the tables know by address alone
        self._patterns: dict[Any, Tensor] = {}
        self._inner_width = decoder.layers[0].feedforward.up.matrix.shape[0]
        self._table = self._model_table(decoder)
        self._function = step_function()

    def __call__(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [M, D], overwritten -> logits [M, K]; keys and values go into the cache."""
        table = self._table.copy()
        row_slots = self._row_slots(len(hidden), slots)
        table[tables.ROWS] = len(hidden)
        table[tables.SLOTS_PER_ROW] = len(hidden) // slots.cache.row_count
        table[tables.ROW_SLOTS] = row_slots.data_ptr()
        self._put_cache(table, slots.cache)
        if self._crosses:
            text = _text_addresses(groups)
            table[tables.TEXT] = text.keys_values.ctypes.data
            table[tables.TEXT_LENGTHS] = text.lengths.ctypes.data
            table[tables.TEXT_STRIDES] = text.head_strides.ctypes.data
            table[tables.TEXT_SEEN] = text.seen.ctypes.data

        threads = torch.get_num_threads()
        logits = hidden.new_empty(len(hidden), self._config.codebook_size)
        table[tables.HIDDEN] = hidden.data_ptr()
        table[tables.LOGITS] = logits.data_ptr()
        buffers = self._put_buffers(table, hidden, slots.cache.slots, threads)

        run(self._function.address, table.ctypes.data, threads)
        del row_slots, buffers  # kept alive until here: the table knows them by address alone
        return logits

    @staticmethod
    def _row_slots(rows: int, slots: Slots) -> Tensor:
        """Slot [M] int64 of each row of the stream."""
        if isinstance(slots, SharedSlots):
            return torch.full((rows,), slots.first)
        return slots.slots.flatten()

    @staticmethod
    def _put_cache(table: np.ndarray, cache: SelfCache) -> None:
        layer_stride, row_stride = cache.keys.stride()[:2]
        table[tables.KEYS] = cache.keys.data_ptr()
        table[tables.VALUES] = cache.values.data_ptr()
        table[tables.LAYER_STRIDE] = layer_stride
        table[tables.ROW_STRIDE] = row_stride
        table[tables.SLOTS] = cache.slots
        table[tables.SEEN] = 0 if cache.seen is None else cache.seen.data_ptr()

    def _put_buffers(self, table: np.ndarray, hidden: Tensor, slots: int, threads: int) -> Tensor:
        """Allocate working memory as one tensor and enter its parts; the caller keeps it alive."""
        config, rows = self._config, len(hidden)
        query_width = config.heads * config.head_dim
        qkv_width = (config.heads + 2 * self._kv_heads) * config.head_dim
        sizes = {
            tables.HEADS_IN: rows * qkv_width,
            tables.HEADS_OUT: rows * query_width,
            tables.INNER: rows * self._inner_width,
            tables.PROJECTED: rows * config.width,
        }
        scores = max(slots, config.text_length)
        scratch = scratch_numbers(rows, int(table[tables.MAX_INPUTS]), scores)
        buffers = hidden.new_empty(sum(sizes.values()) + threads * scratch)

        address = buffers.data_ptr()
        for entry, size in sizes.items():
            table[entry] = address
            address += 4 * size
        table[tables.SCRATCH] = address
        table[tables.SCRATCH_BYTES] = 4 * scratch
        return buffers

    def _model_table(self, decoder: StepSource) -> np.ndarray:
        """Build a step's table [STEP_SIZE] with the entries of the model, the others 0."""
        config = decoder.config
        layers = np.stack([self._layer_table(layer) for layer in decoder.layers])
        self._kept.append(layers)
        feedforward = decoder.layers[0].feedforward

        table = np.zeros(tables.STEP_SIZE, dtype=np.int64)
        table[tables.LAYERS] = layers.ctypes.data
        table[tables.LAYER_COUNT] = len(layers)
        table[tables.WIDTH] = config.width
        table[tables.HEADS] = config.heads
        table[tables.KV_HEADS] = decoder.kv_heads
        table[tables.HEAD_DIM] = config.head_dim
        table[tables.CROSSES] = decoder.crosses
        table[tables.GATED] = feedforward.gated
        table[tables.ACTIVATION] = ACTIVATIONS[type(feedforward.activation)]
        table[tables.INT8] = decoder.to_logits.scale_127 is not None
        self._put_norm(table, tables.FINAL_NORM, decoder.final_norm)
        self._put_matrix(table, tables.TO_LOGITS, decoder.to_logits)
        if decoder.rotations is not None:
            cosines_sines = torch.view_as_real(decoder.rotations).contiguous()
            table[tables.ROTATIONS] = self._address(cosines_sines)
        inner_width = feedforward.out.matrix.shape[1]
        table[tables.MAX_INPUTS] = max(config.width, config.heads * config.head_dim, inner_width)
        return table

    def _layer_table(self, layer: Layer) -> np.ndarray:
        """Build the table [LAYER_SIZE] of one layer."""
        attention, cross, feedforward = layer
        table = np.zeros(tables.LAYER_SIZE, dtype=np.int64)
        self._put_norm(table, tables.SELF_NORM, attention.norm)
        self._put_matrix(table, tables.QKV, attention.qkv)
        table[tables.SELF_HEAD_GAINS] = self._head_gains(attention.head_norm)
        table[tables.PATTERN] = self._pattern(attention.pattern)
        self._put_matrix(table, tables.SELF_OUT, attention.out)
        self._put_norm(table, tables.SELF_NORM_AFTER, attention.norm_after)
        if cross is not None:
            self._put_norm(table, tables.CROSS_NORM, cross.norm)
            self._put_matrix(table, tables.CROSS_QUERY, cross.query)
            table[tables.CROSS_HEAD_GAINS] = self._head_gains(cross.query_norm)
            self._put_matrix(table, tables.CROSS_OUT, cross.out)
            self._put_norm(table, tables.CROSS_NORM_AFTER, cross.norm_after)
        self._put_norm(table, tables.FEED_NORM, feedforward.norm)
        self._put_matrix(table, tables.FEED_UP, feedforward.up)
        self._put_norm(table, tables.FEED_INNER_NORM, feedforward.inner_norm)
        self._put_matrix(table, tables.FEED_OUT, feedforward.out)
        self._put_norm(table, tables.FEED_NORM_AFTER, feedforward.norm_after)
        return table

    def _address(self, tensor: Tensor | None) -> int:
        """Address of a tensor, which is kept alive from now on; 0 for None."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _put_norm(self, table: np.ndarray, start: int, norm: Norm | None) -> None:
        """Enter a norm; without one the entry stays 0, which is kind NO_NORM."""
        if norm is None:
            return
        if norm.rms:
            gain, kind = norm.scaled_gain, tables.RMS
            epsilon = norm.epsilon * len(norm.gain)
        else:
            gain, kind = norm.gain, tables.LAYER_NORM
            epsilon = norm.epsilon
        table[start + tables.GAIN] = self._address(gain)
        table[start + tables.NORM_BIAS] = self._address(norm.bias)
        table[start + tables.KIND] = kind
        table[start + tables.EPSILON] = np.float32(epsilon).view(np.int32)

    def _put_matrix(self, table: np.ndarray, start: int, projection: Projection) -> None:
        outputs, inputs = projection.matrix.shape
        table[start + tables.WEIGHT] = self._address(projection.matrix)
        table[start + tables.SCALE] = self._address(projection.scale_127)
        table[start + tables.BIAS] = self._address(projection.bias)
        table[start + tables.OUTPUTS] = outputs
        table[start + tables.INPUTS] = inputs

    def _head_gains(self, norm: HeadNorm | None) -> int:
        return 0 if norm is None else self._address(norm.scaled_gain)

    def _pattern(self, pattern: Any) -> int:
        """Address of an attention mask [S, S] of bytes; 0 where every slot sees all before it."""
        if pattern.name == "full":
            return 0
        if pattern not in self._patterns:
            self._patterns[pattern] = pattern.mask(self._slots)
        return self._address(self._patterns[pattern])


class _TextAddresses(NamedTuple):
    """Where each row finds its caption; a step's table holds the addresses of these arrays."""

    keys_values: np.ndarray  # addresses [layers, 2, R] of keys and of values [G, T, d]
    lengths: np.ndarray  # T [R]
    head_strides: np.ndarray  # numbers from one head to the next [R]
    seen: np.ndarray  # addresses [R] of masks [T]; 0 where all of the text is real


def _text_addresses(groups: list[CaptionMemory]) -> _TextAddresses:
    rows = sum(group.rows for group in groups)
    layers = len(groups[0].keys)
    text = _TextAddresses(
        keys_values=np.empty((layers, 2, rows), dtype=np.int64),
        lengths=np.zeros(rows, dtype=np.int64),
        head_strides=np.zeros(rows, dtype=np.int64),
        seen=np.zeros(rows, dtype=np.int64))

    start = 0
    for group in groups:
        part = slice(start, start + group.rows)
        caption_of_row = np.arange(group.captions).repeat(group.images)
        caption_stride, head_stride = group.keys[0].stride()[:2]
        for which, tensors in enumerate((group.keys, group.values)):
            addresses = np.array([tensor.data_ptr() for tensor in tensors])  # [layers]
            offsets = caption_of_row * caption_stride * 4  # [rows of the group]
            text.keys_values[:, which, part] = addresses[:, None] + offsets
        text.lengths[part] = group.keys[0].shape[2]
        text.head_strides[part] = head_stride
        if group.seen is not None:
            text.seen[part] = group.seen.data_ptr() + caption_of_row * group.seen.stride(0)
        start += group.rows
    return text
