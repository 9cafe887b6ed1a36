"""One decoder step as compiled code that all threads run: the layers of `decoder.layers`.

Between matrices there are hundreds of small sums over a few hundred numbers, each of which costs
more to start from Python than to compute. Here a step is one call. Threads share each part of a
layer, by outputs, heads or rows, and wait for each other after it.

Sizes and addresses come in tables (`inference.decoder.native.tables`), which
`inference.decoder.native.step` fills. Compiled code checks no bounds.
"""

# Axes: M rows of the stream (R rows x s slots), D width, H heads, G key/value heads, d head width,
#       S slots, T text slots, I inputs, O outputs

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from inference.decoder.native import tables as t
from inference.decoder.native.attention import cross_attention, self_attention
from inference.decoder.native.basics import (
    ROOT_HALF,
    compiled_part,
    error_function,
    exponential,
    float32_at,
    int64_at,
    thread_share,
    version,
)
from inference.decoder.native.matrices import (
    matrix_of,
    multiply_prepared,
    norm_of,
    prepare_inputs,
    project,
    project_and_add,
)
from inference.decoder.native.products import PANEL
from inference.decoder.native.threads import barrier, compiled, thread_count, thread_number


@compiled_part
def feedforward_up(step, thread, threads, layer):
    """The feed-forward block up to its activation; the result begins each row of INNER.

    Each thread computes the gates that belong to its own values, so that no barrier is needed
    before the activation.
    """
    matrix = matrix_of(layer, t.FEED_UP)
    stride = layer[t.FEED_UP + t.OUTPUTS]  # I of the second matrix, twice if gated
    inner_width = layer[t.FEED_OUT + t.INPUTS]
    norm, width = norm_of(layer, t.FEED_NORM), step[t.WIDTH]
    rows, row_stride = prepare_inputs(step, thread, norm, step[t.HIDDEN], width, width)
    first, end = thread_share(inner_width, PANEL, thread, threads)
    multiply_prepared(step, thread, matrix, rows, row_stride, step[t.INNER], stride, first, end)
    if step[t.GATED]:
        multiply_prepared(step, thread, matrix, rows, row_stride, step[t.INNER], stride,
                          inner_width + first, inner_width + end)

    for row in range(step[t.ROWS]):
        inner = float32_at(step[t.INNER] + row * stride * 4, stride)
        gate = inner_width if step[t.GATED] else 0
        for at in range(first, end):
            factor = inner[at] if step[t.GATED] else np.float32(1)
            value = inner[gate + at]
            if step[t.ACTIVATION] == t.SILU:
                inner[at] = factor * value / (np.float32(1) + exponential(-value))
            else:
                inner[at] = (factor * value * np.float32(0.5)
                             * (np.float32(1) + error_function(value * ROOT_HALF)))


@compiled_part
def run_self_attention(step, thread, threads, layer, layer_number):
    """HIDDEN += self-attention; threads share the key/value heads of all rows."""
    project(step, thread, threads, norm_of(layer, t.SELF_NORM), matrix_of(layer, t.QKV),
            step[t.HIDDEN], step[t.WIDTH], step[t.HEADS_IN])
    barrier()
    rows, groups = step[t.ROWS] // step[t.SLOTS_PER_ROW], step[t.KV_HEADS]
    first, end = thread_share(rows * groups, 1, thread, threads)
    for unit in range(first, end):
        self_attention(step, thread, layer, layer_number, unit // groups, unit % groups)
    barrier()
    project_and_add(step, thread, threads, norm_of(layer, t.IDENTITY), matrix_of(layer, t.SELF_OUT),
                    step[t.HEADS_OUT], step[t.HEADS] * step[t.HEAD_DIM],
                    norm_of(layer, t.SELF_NORM_AFTER))


@compiled_part
def run_cross_attention(step, thread, threads, layer, layer_number):
    """HIDDEN += cross-attention; threads share the query heads of all rows."""
    project(step, thread, threads, norm_of(layer, t.CROSS_NORM), matrix_of(layer, t.CROSS_QUERY),
            step[t.HIDDEN], step[t.WIDTH], step[t.HEADS_IN])
    barrier()
    rows, heads = step[t.ROWS] // step[t.SLOTS_PER_ROW], step[t.HEADS]
    first, end = thread_share(rows * heads, 1, thread, threads)
    for unit in range(first, end):
        cross_attention(step, thread, layer, layer_number, unit // heads, unit % heads)
    barrier()
    project_and_add(step, thread, threads, norm_of(layer, t.IDENTITY),
                    matrix_of(layer, t.CROSS_OUT), step[t.HEADS_OUT], heads * step[t.HEAD_DIM],
                    norm_of(layer, t.CROSS_NORM_AFTER))


@compiled_part
def run_layer(step, thread, threads, layer, layer_number):
    """Add self-attention, cross-attention (if the model has it) and feed-forward to HIDDEN."""
    run_self_attention(step, thread, threads, layer, layer_number)
    if step[t.CROSSES]:
        run_cross_attention(step, thread, threads, layer, layer_number)
    feedforward_up(step, thread, threads, layer)
    barrier()
    project_and_add(step, thread, threads, norm_of(layer, t.FEED_INNER_NORM),
                    matrix_of(layer, t.FEED_OUT), step[t.INNER], layer[t.FEED_UP + t.OUTPUTS],
                    norm_of(layer, t.FEED_NORM_AFTER))


@compiled_part
def run_step(step):
    """All layers on HIDDEN, then LOGITS."""
    thread, threads = thread_number(), thread_count()
    layers = int64_at(step[t.LAYERS], step[t.LAYER_COUNT] * t.LAYER_SIZE)
    for number in range(step[t.LAYER_COUNT]):
        layer = layers[number * t.LAYER_SIZE: (number + 1) * t.LAYER_SIZE]
        run_layer(step, thread, threads, layer, number)
    project(step, thread, threads, norm_of(step, t.FINAL_NORM), matrix_of(step, t.TO_LOGITS),
            step[t.HIDDEN], step[t.WIDTH], step[t.LOGITS])


@lru_cache(maxsize=1)
def step_function() -> Any:
    """`run_step` as a C function of a table's address, compiled or read from the disk cache."""
    source = version()

    def step(table):
        if source:  # a captured value is part of the cache key, see `version`
            run_step(carray(table, (t.STEP_SIZE,)))

    return compiled(step, "compiling the decoder for this processor: once, 20 seconds or more")
