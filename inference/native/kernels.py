"""One step of the lean decoder as compiled code that every thread of a team runs: what `inference.decoder.layers` computes.

Between matrices there are hundreds of small sums over a few hundred numbers, each of which costs more to start from Python
than to do. Here a step is one call. Threads share each part of a layer, by outputs, heads or rows, and wait for each other
after it.

Numbers and addresses come in tables (`inference.native.tables`), which `inference.native.step` fills. Compiled code checks no
bounds.
"""

# Axes: M rows of the stream (R rows x s slots), D width, H heads, G key/value heads, d head width, S slots, T text slots,
#       I inputs, O outputs

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from inference.native import tables as t
from inference.native.basics import (
    ROOT_HALF,
    compiled_part,
    error_function,
    exponential,
    floats,
    ints,
    largest,
    largest_size,
    longs,
    normed,
    share,
    shorts,
    version,
    whole_bytes,
)
from inference.native.products import PANEL, multiply_floats, multiply_integers
from inference.native.threads import barrier, compiled, team_size, thread_number

HIDDEN_SCORE = np.float32(-3e38)  # exp of it is 0; minus infinity less minus infinity would be no number


@compiled_part
def matrix_of(table, at):
    return table[at: at + t.MATRIX]


@compiled_part
def norm_of(table, at):
    return table[at: at + t.NORM]


@compiled_part
def put_normed(norm, source, target, count):
    """target = source through a norm of a table."""
    normed(source, target, count, norm[t.KIND], floats(norm[t.GAIN], count), np.int32(norm[t.EPSILON]).view(np.float32))
    if norm[t.NORM_BIAS]:
        bias = floats(norm[t.NORM_BIAS], count)
        for at in range(count):
            target[at] += bias[at]


@compiled_part
def private_parts(step, number):
    """Of thread `number`: addresses of largest sizes [M], normed rows [M, I], rounded rows [M, I], scores [S or T]."""
    start = step[t.PRIVATE] + number * step[t.PRIVATE_BYTES]
    rows = start + step[t.ROWS] * 4
    rounded = rows + step[t.ROWS] * step[t.MOST_INPUTS] * 4
    return start, rows, rounded, rounded + step[t.ROWS] * step[t.MOST_INPUTS] * 2


@compiled_part
def prepared(step, number, norm, source, stride, inputs):
    """Rows [M, I] at `source`, normed, and rounded where matrices are int8 -> (address, stride)."""
    most_at, rows, rounded, _ = private_parts(step, number)
    if norm[t.KIND] != t.NO_NORM:
        for row in range(step[t.ROWS]):
            put_normed(norm, floats(source + row * stride * 4, inputs), floats(rows + row * inputs * 4, inputs), inputs)
        source, stride = rows, inputs
    if not step[t.INT8]:
        return source, stride
    most = floats(most_at, step[t.ROWS])
    for row in range(step[t.ROWS]):
        values = floats(source + row * stride * 4, inputs)
        nothing = np.float32(0)
        for at in range(inputs):
            nothing += values[at] * np.float32(0)
        most[row] = largest_size(values, inputs) + nothing  # no number where an input is none
        factor = np.float32(127) / most[row]
        whole = shorts(rounded + row * inputs * 2, inputs)
        for at in range(inputs):
            whole[at] = np.int16(np.rint(values[at] * factor))
    return rounded, inputs


@compiled_part
def projected(step, number, matrix, rows, stride, out, out_stride, first, last):
    """Outputs first .. last - 1 of `matrix` for prepared rows -> out [M, out_stride], with the bias."""
    sizes = (matrix[t.INPUTS], stride, out_stride)
    if step[t.INT8]:
        multiply_integers(matrix[t.WEIGHT], rows, out, (first, last), step[t.ROWS], sizes)
        most = floats(private_parts(step, number)[0], step[t.ROWS])
        scale = floats(matrix[t.SCALE], last)
        for row in range(step[t.ROWS]):
            sums = ints(out + row * out_stride * 4, last)
            values = floats(out + row * out_stride * 4, last)
            for at in range(first, last):
                values[at] = np.float32(sums[at]) * scale[at] * most[row]
    else:
        multiply_floats(matrix[t.WEIGHT], rows, out, (first, last), step[t.ROWS], sizes)
    if matrix[t.BIAS]:
        bias = floats(matrix[t.BIAS], last)
        for row in range(step[t.ROWS]):
            values = floats(out + row * out_stride * 4, last)
            for at in range(first, last):
                values[at] += bias[at]


@compiled_part
def project(step, number, team, norm, matrix, source, stride, out):
    """out [M, O] = matrix * norm(source); the thread's share of outputs."""
    rows, row_stride = prepared(step, number, norm, source, stride, matrix[t.INPUTS])
    first, last = share(matrix[t.OUTPUTS], PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, out, matrix[t.OUTPUTS], first, last)


@compiled_part
def add_projected(step, number, team, norm, matrix, source, stride, after):
    """hidden += matrix * norm(source), normed where there is a norm after; ends with a barrier."""
    width = step[t.WIDTH]
    rows, row_stride = prepared(step, number, norm, source, stride, matrix[t.INPUTS])
    first, last = share(width, PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, step[t.AFTER], width, first, last)
    own_rows = 0, step[t.ROWS]
    if after[t.KIND] != t.NO_NORM:
        barrier()
        own_rows = share(step[t.ROWS], 1, number, team)
        first, last = 0, width
    for row in range(own_rows[0], own_rows[1]):
        hidden = floats(step[t.HIDDEN] + row * width * 4, width)
        values = floats(step[t.AFTER] + row * width * 4, width)
        if after[t.KIND] != t.NO_NORM:
            put_normed(after, values, values, width)
        for at in range(first, last):
            hidden[at] += values[at]
    barrier()


@compiled_part
def turn_head(step, head, gain_at, slot):
    """A head [d] in place: its norm (gain at `gain_at`), and rotary by its slot's cosines and sines."""
    width = step[t.HEAD_DIM]
    if gain_at:
        normed(head, head, width, t.RMS, floats(gain_at, width), np.float32(0))
    if step[t.TURNS]:
        angles = floats(step[t.TURNS] + slot * width * 4, width)
        for pair in range(width // 2):
            real, imaginary = head[2 * pair], head[2 * pair + 1]
            cosine, sine = angles[2 * pair], angles[2 * pair + 1]
            head[2 * pair] = real * cosine - imaginary * sine
            head[2 * pair + 1] = real * sine + imaginary * cosine


@compiled_part
def attend(query, keys, values, count, width, out_at, scores_at, first_mask, second_mask):
    """out [d] = attention of a query to `count` keys and values [count, d]; masks: addresses of bytes, 1 = seen, or 0."""
    scores, out, rows = floats(scores_at, count), floats(out_at, width), floats(values, count * width)
    multiply_floats(keys, query, scores_at, (0, count), 1, (width, width, count))
    for mask in (first_mask, second_mask):
        if mask:
            seen = whole_bytes(mask, count)
            for at in range(count):
                scores[at] = scores[at] if seen[at] else HIDDEN_SCORE
    scale = np.float32(1) / np.sqrt(np.float32(width))
    most, total = largest(scores, count), np.float32(0)
    for at in range(count):
        scores[at] = exponential((scores[at] - most) * scale)
        total += scores[at]
    for lane in range(width):
        out[lane] = 0
    whole = count // 4 * 4
    for at in range(0, whole, 4):
        first, second, third, fourth = scores[at], scores[at + 1], scores[at + 2], scores[at + 3]
        start = at * width
        for lane in range(width):
            out[lane] += (first * rows[start + lane] + second * rows[start + width + lane]
                          + third * rows[start + 2 * width + lane] + fourth * rows[start + 3 * width + lane])
    for at in range(whole, count):
        for lane in range(width):
            out[lane] += scores[at] * rows[at * width + lane]
    factor = np.float32(1) / total
    for lane in range(width):
        out[lane] *= factor


@compiled_part
def attend_to_row(step, number, layer, at, row, group):
    """One head of keys and values of one row: its s new slots into the cache, then its queries' attention."""
    width, heads, groups, at_once = step[t.HEAD_DIM], step[t.HEADS], step[t.KV_HEADS], step[t.AT_ONCE]
    both, slots = heads + 2 * groups, longs(step[t.AT], step[t.ROWS])
    start = (at * step[t.LAYER_STRIDE] + row * step[t.ROW_STRIDE] + group * step[t.SLOTS] * width) * 4
    keys, values = step[t.KEYS] + start, step[t.VALUES] + start
    gain = layer[t.SELF_HEADS]
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        key = floats(step[t.HEADS_IN] + (stream * both + heads + group) * width * 4, width)
        value = floats(step[t.HEADS_IN] + (stream * both + heads + groups + group) * width * 4, width)
        turn_head(step, key, gain + (heads + group) * width * 4 if gain else 0, slot)
        kept_key, kept_value = floats(keys + slot * width * 4, width), floats(values + slot * width * 4, width)
        for lane in range(width):
            kept_key[lane] = key[lane]
            kept_value[lane] = value[lane]
    scores = private_parts(step, number)[3]
    seen = step[t.SEEN] + row * step[t.SLOTS] if step[t.SEEN] else 0
    each = heads // groups
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        pattern = layer[t.PATTERN] + slot * step[t.SLOTS] if layer[t.PATTERN] else 0
        for head in range(group * each, (group + 1) * each):
            query = step[t.HEADS_IN] + (stream * both + head) * width * 4
            turn_head(step, floats(query, width), gain + head * width * 4 if gain else 0, slot)
            attend(query, keys, values, slot + 1, width, step[t.HEADS_OUT] + (stream * heads + head) * width * 4, scores, seen,
                   pattern)


@compiled_part
def attend_to_caption(step, number, layer, at, row, head):
    """One head's queries of one row: their attention to the row's caption."""
    width, heads, at_once, rows = step[t.HEAD_DIM], step[t.HEADS], step[t.AT_ONCE], step[t.ROWS] // step[t.AT_ONCE]
    length, seen = longs(step[t.TEXT_LENGTHS], rows)[row], longs(step[t.TEXT_SEEN], rows)[row]
    group = head // (heads // step[t.KV_HEADS])
    text = longs(step[t.TEXT] + at * 2 * rows * 8, 2 * rows)
    to_group = group * longs(step[t.TEXT_STRIDES], rows)[row] * 4
    keys, values = text[row] + to_group, text[rows + row] + to_group
    gain, scores = layer[t.CROSS_HEADS], private_parts(step, number)[3]
    for stream in range(row * at_once, (row + 1) * at_once):
        place = (stream * heads + head) * width * 4
        query = step[t.HEADS_IN] + place
        if gain:
            normed(floats(query, width), floats(query, width), width, t.RMS, floats(gain + head * width * 4, width),
                   np.float32(0))
        attend(query, keys, values, length, width, step[t.HEADS_OUT] + place, scores, seen, 0)


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
