"""One step of the lean decoder as compiled code that every thread of a team runs: what `inference.decoder.layers` computes.

Between matrices there are hundreds of small sums over a few hundred numbers, each of which costs more to start from Python
than to do. Here a step is one call. Threads share each part of a layer, by outputs, heads or rows, and wait for each other
after it.

Numbers and addresses come in tables (`inference.decoder.native.tables`), which `inference.decoder.native.step` fills. Compiled code checks no
bounds.
"""

# Axes: M rows of the stream (R rows x s slots), D width, H heads, G key/value heads, d head width, S slots, T text slots,
#       I inputs, O outputs

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from inference.decoder.native import tables as t
from inference.decoder.native.attention import attend_to_caption, attend_to_row
from inference.decoder.native.basics import (
    ROOT_HALF,
    compiled_part,
    error_function,
    exponential,
    floats,
    longs,
    share,
    version,
)
from inference.decoder.native.matrices import (
    add_projected,
    matrix_of,
    norm_of,
    prepared,
    project,
    projected,
)
from inference.decoder.native.products import PANEL
from inference.decoder.native.threads import barrier, compiled, team_size, thread_number


@compiled_part
def feed(step, number, team, layer):
    """The feed-forward block up to its activation, which lies at the front of each row of INNER."""
    matrix, stride, inputs = matrix_of(layer, t.FEED_UP), layer[t.FEED_UP + t.OUTPUTS], layer[t.FEED_OUT + t.INPUTS]
    rows, row_stride = prepared(step, number, norm_of(layer, t.FEED_NORM), step[t.HIDDEN], step[t.WIDTH], step[t.WIDTH])
    first, last = share(inputs, PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, step[t.INNER], stride, first, last)
    if step[t.GATED]:
        projected(step, number, matrix, rows, row_stride, step[t.INNER], stride, inputs + first, inputs + last)
    for row in range(step[t.ROWS]):
        inner = floats(step[t.INNER] + row * stride * 4, stride)
        gate = inputs if step[t.GATED] else 0
        for at in range(first, last):
            factor = inner[at] if step[t.GATED] else np.float32(1)
            value = inner[gate + at]
            if step[t.ACTIVATION] == t.SILU:
                inner[at] = factor * value / (np.float32(1) + exponential(-value))
            else:
                inner[at] = factor * value * np.float32(0.5) * (np.float32(1) + error_function(value * ROOT_HALF))


@compiled_part
def run_layer(step, number, team, layer, at):
    """Self-attention, cross-attention where there is one, feed-forward, on HIDDEN."""
    width, rows = step[t.WIDTH], step[t.ROWS] // step[t.AT_ONCE]
    heads = step[t.HEADS] * step[t.HEAD_DIM]
    project(step, number, team, norm_of(layer, t.SELF_NORM), matrix_of(layer, t.QKV), step[t.HIDDEN], width, step[t.HEADS_IN])
    barrier()
    first, last = share(rows * step[t.KV_HEADS], 1, number, team)
    for unit in range(first, last):
        attend_to_row(step, number, layer, at, unit // step[t.KV_HEADS], unit % step[t.KV_HEADS])
    barrier()
    add_projected(step, number, team, norm_of(layer, t.NOTHING), matrix_of(layer, t.SELF_OUT), step[t.HEADS_OUT], heads,
                  norm_of(layer, t.SELF_AFTER))
    if step[t.CROSSES]:
        project(step, number, team, norm_of(layer, t.CROSS_NORM), matrix_of(layer, t.CROSS_QUERY), step[t.HIDDEN],
                width, step[t.HEADS_IN])
        barrier()
        first, last = share(rows * step[t.HEADS], 1, number, team)
        for unit in range(first, last):
            attend_to_caption(step, number, layer, at, unit // step[t.HEADS], unit % step[t.HEADS])
        barrier()
        add_projected(step, number, team, norm_of(layer, t.NOTHING), matrix_of(layer, t.CROSS_OUT), step[t.HEADS_OUT], heads,
                      norm_of(layer, t.CROSS_AFTER))
    feed(step, number, team, layer)
    barrier()
    add_projected(step, number, team, norm_of(layer, t.FEED_INNER), matrix_of(layer, t.FEED_OUT), step[t.INNER],
                  layer[t.FEED_UP + t.OUTPUTS], norm_of(layer, t.FEED_AFTER))


@compiled_part
def run_step(step):
    """All layers on HIDDEN, then LOGITS."""
    number, team = thread_number(), team_size()
    layers = longs(step[t.LAYERS], step[t.LAYER_COUNT] * t.LAYER)
    for at in range(step[t.LAYER_COUNT]):
        run_layer(step, number, team, layers[at * t.LAYER: (at + 1) * t.LAYER], at)
    project(step, number, team, norm_of(step, t.FINAL_NORM), matrix_of(step, t.TO_LOGITS), step[t.HIDDEN],
            step[t.WIDTH], step[t.LOGITS])


@lru_cache(maxsize=1)
def step_function() -> Any:
    """`run_step` as a C function of the address of a table; compiled, or as it was compiled before on this machine."""
    source = version()

    def step(table):
        if source:
            run_step(carray(table, (t.STEP,)))

    return compiled(step)
