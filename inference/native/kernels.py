"""One step of the lean decoder as compiled code that every thread of a team runs: what `inference.decoder_layers` computes.

Between matrices there are hundreds of small sums over a few hundred numbers, each of which costs more to start from Python
than to do. Here a step is one call. Threads share each part of a layer, by outputs, heads or rows, and wait for each other
after it.

Numbers and addresses come in tables (`inference.native.tables`), which `inference.native.step` fills. Compiled code checks no
bounds.
"""

# Axes: M rows of the stream (R rows x s slots), D width, H heads, G key/value heads, d head width, S slots, T text slots,
#       I inputs, O outputs

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from inference.native.products import PANEL, multiply_floats, multiply_integers
from inference.native.tables import (
    ACTIVATION, AFTER, AT, AT_ONCE, BIAS, CROSS_AFTER, CROSS_HEADS, CROSS_NORM, CROSS_OUT, CROSS_QUERY, CROSSES, FEED_AFTER,
    FEED_INNER, FEED_NORM, FEED_OUT, FEED_UP, FINAL_NORM, GAIN, GATED, HEAD_DIM, HEADS, HEADS_IN, HEADS_OUT, HIDDEN, INNER, INPUTS,
    INT8, KEYS, KIND, KV_HEADS, LAYER, LAYER_COUNT, LAYER_NORM, LAYER_STRIDE, LAYERS, LOGITS, MATRIX, MOST_INPUTS, NO_NORM, NORM, NOTHING, OUTPUTS,
    PATTERN, PRIVATE, PRIVATE_BYTES, QKV, RMS, ROW_STRIDE, ROWS, SCALE, SEEN, SELF_AFTER, SELF_HEADS, SELF_NORM, SELF_OUT, SILU,
    SLOTS, STEP, TEXT, TEXT_LENGTHS, TEXT_SEEN, TEXT_STRIDES, TO_LOGITS, TURNS, VALUES, WEIGHT, WIDTH)
from inference.native.threads import barrier, library, team_size, thread_number

HIDDEN_SCORE = np.float32(-3e38)  # exp of it is 0; minus infinity less minus infinity would be no number
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
ROOT_HALF = np.float32(math.sqrt(0.5))
_compiled = njit(error_model="numpy", nogil=True, fastmath=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _pointer_to(number: Any, bits: ir.Type) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        """The address as a pointer."""
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            return builder.inttoptr(values[0], bits.as_pointer())
        return types.CPointer(number)(types.int64), generate
    return pointer


_float_pointer = _pointer_to(types.float32, ir.FloatType())
_long_pointer = _pointer_to(types.int64, ir.IntType(64))
_int_pointer = _pointer_to(types.int32, ir.IntType(32))
_short_pointer = _pointer_to(types.int16, ir.IntType(16))
_byte_pointer = _pointer_to(types.uint8, ir.IntType(8))


@_compiled
def floats(address, count):
    return carray(_float_pointer(address), (count,))


@_compiled
def longs(address, count):
    return carray(_long_pointer(address), (count,))


@_compiled
def whole_bytes(address, count):
    return carray(_byte_pointer(address), (count,))


@_compiled
def share(count, unit, number, team):
    """The part of `count` things, in units, that thread `number` of a team does."""
    units = (count + unit - 1) // unit
    return min(units * number // team * unit, count), min(units * (number + 1) // team * unit, count)


@njit(error_model="numpy", nogil=True, fastmath={"contract", "nnan", "ninf", "nsz"})
def exponential(x):
    """e to the x, to 2e-7 of its value, of any x up to 88: 2 to a whole number times a polynomial (Cephes' expf)."""
    x = max(x, np.float32(-87.0))
    power = np.floor(x * LOG2_E + np.float32(0.5))
    rest = x - power * LN_2
    result = np.float32(1.9875691500e-4)
    result = result * rest + np.float32(1.3981999507e-3)
    result = result * rest + np.float32(8.3334519073e-3)
    result = result * rest + np.float32(4.1665795894e-2)
    result = result * rest + np.float32(1.6666665459e-1)
    result = result * rest + np.float32(5.0000001201e-1)
    result = result * rest * rest + rest + np.float32(1.0)
    return result * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(error_model="numpy", nogil=True, fastmath={"contract", "nnan", "ninf", "nsz"})
def error_function(x):
    """erf, to 2e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size = abs(x)
    part = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * size)
    series = np.float32(1.061405429)
    series = series * part - np.float32(1.453152027)
    series = series * part + np.float32(1.421413741)
    series = series * part - np.float32(0.284496736)
    series = series * part + np.float32(0.254829592)
    result = np.float32(1) - series * part * exponential(-size * size)
    return result if x >= 0 else -result


@_compiled
def normed(source, target, count, kind, gain):
    """target = the norm of source: RMS (gain holds the root of the width too), layer norm, or source itself."""
    if kind == RMS:
        total = np.float32(0)
        for at in range(count):
            total += source[at] * source[at]
        factor = np.float32(1) / max(np.sqrt(total), np.float32(1e-12))
        for at in range(count):
            target[at] = source[at] * factor * gain[at]
        return
    total = np.float32(0)
    for at in range(count):
        total += source[at]
    mean = total / np.float32(count)
    spread = np.float32(0)
    for at in range(count):
        spread += (source[at] - mean) * (source[at] - mean)
    factor = np.float32(1) / np.sqrt(spread / np.float32(count) + np.float32(1e-5))
    for at in range(count):
        target[at] = (source[at] - mean) * factor * gain[at]


@_compiled
def private_parts(step, number):
    """Of thread `number`: addresses of largest [M], normed rows [M, I], rounded rows [M, I], scores [S or T]."""
    start = step[PRIVATE] + number * step[PRIVATE_BYTES]
    rows = start + step[ROWS] * 4
    rounded = rows + step[ROWS] * step[MOST_INPUTS] * 4
    return start, rows, rounded, rounded + step[ROWS] * step[MOST_INPUTS] * 2


@_compiled
def prepared(step, number, norm, source, stride, inputs):
    """Rows [M, I] at `source`, normed, and rounded where matrices are int8 -> (address, stride)."""
    largest_at, rows, rounded, _ = private_parts(step, number)
    if norm[KIND] != NO_NORM:
        gain = floats(norm[GAIN], inputs)
        for row in range(step[ROWS]):
            normed(floats(source + row * stride * 4, inputs), floats(rows + row * inputs * 4, inputs), inputs, norm[KIND], gain)
        source, stride = rows, inputs
    if not step[INT8]:
        return source, stride
    largest = floats(largest_at, step[ROWS])
    for row in range(step[ROWS]):
        values = floats(source + row * stride * 4, inputs)
        most = np.float32(1e-30)
        for at in range(inputs):
            most = max(most, abs(values[at]))
        largest[row] = most
        factor = np.float32(127) / most
        whole = carray(_short_pointer(rounded + row * inputs * 2), (inputs,))
        for at in range(inputs):
            whole[at] = np.int16(np.rint(values[at] * factor))
    return rounded, inputs


@_compiled
def projected(step, number, matrix, rows, stride, out, out_stride, first, last):
    """Outputs first .. last - 1 of `matrix` for prepared rows -> out [M, out_stride], with the bias."""
    sizes = (matrix[INPUTS], stride, out_stride)
    if step[INT8]:
        multiply_integers(matrix[WEIGHT], rows, out, (first, last), step[ROWS], sizes)
        largest = floats(private_parts(step, number)[0], step[ROWS])
        scale = floats(matrix[SCALE], last)
        for row in range(step[ROWS]):
            sums = carray(_int_pointer(out + row * out_stride * 4), (last,))
            values = floats(out + row * out_stride * 4, last)
            for at in range(first, last):
                values[at] = np.float32(sums[at]) * scale[at] * largest[row]
    else:
        multiply_floats(matrix[WEIGHT], rows, out, (first, last), step[ROWS], sizes)
    if matrix[BIAS]:
        bias = floats(matrix[BIAS], last)
        for row in range(step[ROWS]):
            values = floats(out + row * out_stride * 4, last)
            for at in range(first, last):
                values[at] += bias[at]


@_compiled
def project(step, number, team, norm, matrix, source, stride, out):
    """out [M, O] = matrix * norm(source); the thread's share of outputs."""
    rows, row_stride = prepared(step, number, norm, source, stride, matrix[INPUTS])
    first, last = share(matrix[OUTPUTS], PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, out, matrix[OUTPUTS], first, last)


@_compiled
def add_projected(step, number, team, norm, matrix, source, stride, after):
    """hidden += matrix * norm(source), normed where there is a norm after; ends with a barrier."""
    width = step[WIDTH]
    rows, row_stride = prepared(step, number, norm, source, stride, matrix[INPUTS])
    first, last = share(width, PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, step[AFTER], width, first, last)
    own_rows = 0, step[ROWS]
    if after[KIND] != NO_NORM:
        barrier()
        own_rows = share(step[ROWS], 1, number, team)
        first, last = 0, width
    for row in range(own_rows[0], own_rows[1]):
        hidden = floats(step[HIDDEN] + row * width * 4, width)
        values = floats(step[AFTER] + row * width * 4, width)
        if after[KIND] != NO_NORM:
            normed(values, values, width, after[KIND], floats(after[GAIN], width))
        for at in range(first, last):
            hidden[at] += values[at]
    barrier()


@_compiled
def turn_head(step, head, gain_at, slot):
    """A head [d] in place: its norm (gain at `gain_at`), and rotary by its slot's cosines and sines."""
    width = step[HEAD_DIM]
    if gain_at:
        normed(head, head, width, RMS, floats(gain_at, width))
    if step[TURNS]:
        angles = floats(step[TURNS] + slot * width * 4, width)
        for pair in range(width // 2):
            real, imaginary = head[2 * pair], head[2 * pair + 1]
            cosine, sine = angles[2 * pair], angles[2 * pair + 1]
            head[2 * pair] = real * cosine - imaginary * sine
            head[2 * pair + 1] = real * sine + imaginary * cosine


@_compiled
def attend(query, keys, values, count, width, out_at, scores_at, first_mask, second_mask):
    """out [d] = attention of the query at `query` to `count` keys and values [count, d]; masks: addresses of bytes, True = seen."""
    scores, out, rows = floats(scores_at, count), floats(out_at, width), floats(values, count * width)
    multiply_floats(keys, query, scores_at, (0, count), 1, (width, width, count))
    for mask in (first_mask, second_mask):
        if mask:
            seen = whole_bytes(mask, count)
            for at in range(count):
                scores[at] = scores[at] if seen[at] else HIDDEN_SCORE
    scale = np.float32(1) / np.sqrt(np.float32(width))
    most, total = HIDDEN_SCORE, np.float32(0)
    for at in range(count):
        most = max(most, scores[at])
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


@_compiled
def attend_to_row(step, number, layer, at, row, group):
    """One head of keys and values of one row: its s new slots into the cache, then its queries' attention."""
    width, heads, groups, at_once = step[HEAD_DIM], step[HEADS], step[KV_HEADS], step[AT_ONCE]
    both, slots = heads + 2 * groups, longs(step[AT], step[ROWS])
    start = (at * step[LAYER_STRIDE] + row * step[ROW_STRIDE] + group * step[SLOTS] * width) * 4
    keys, values = step[KEYS] + start, step[VALUES] + start
    gain = layer[SELF_HEADS]
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        key = floats(step[HEADS_IN] + (stream * both + heads + group) * width * 4, width)
        value = floats(step[HEADS_IN] + (stream * both + heads + groups + group) * width * 4, width)
        turn_head(step, key, gain + (heads + group) * width * 4 if gain else 0, slot)
        kept_key, kept_value = floats(keys + slot * width * 4, width), floats(values + slot * width * 4, width)
        for lane in range(width):
            kept_key[lane] = key[lane]
            kept_value[lane] = value[lane]
    scores = private_parts(step, number)[3]
    seen = step[SEEN] + row * step[SLOTS] if step[SEEN] else 0
    each = heads // groups
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        pattern = layer[PATTERN] + slot * step[SLOTS] if layer[PATTERN] else 0
        for head in range(group * each, (group + 1) * each):
            query = step[HEADS_IN] + (stream * both + head) * width * 4
            turn_head(step, floats(query, width), gain + head * width * 4 if gain else 0, slot)
            attend(query, keys, values, slot + 1, width, step[HEADS_OUT] + (stream * heads + head) * width * 4, scores, seen,
                   pattern)


@_compiled
def attend_to_caption(step, number, layer, at, row, head):
    """One head's queries of one row: their attention to the row's caption."""
    width, heads, at_once, rows = step[HEAD_DIM], step[HEADS], step[AT_ONCE], step[ROWS] // step[AT_ONCE]
    length, seen = longs(step[TEXT_LENGTHS], rows)[row], longs(step[TEXT_SEEN], rows)[row]
    group = head // (heads // step[KV_HEADS])
    text = longs(step[TEXT] + at * 2 * rows * 8, 2 * rows)
    to_group = group * longs(step[TEXT_STRIDES], rows)[row] * 4
    keys, values = text[row] + to_group, text[rows + row] + to_group
    gain, scores = layer[CROSS_HEADS], private_parts(step, number)[3]
    for stream in range(row * at_once, (row + 1) * at_once):
        place = (stream * heads + head) * width * 4
        query = step[HEADS_IN] + place
        if gain:
            normed(floats(query, width), floats(query, width), width, RMS, floats(gain + head * width * 4, width))
        attend(query, keys, values, length, width, step[HEADS_OUT] + place, scores, seen, 0)


@_compiled
def feed(step, number, team, layer):
    """The feed-forward block up to its activation, which lies at the front of each row of INNER."""
    matrix, stride, inputs = layer[FEED_UP: FEED_UP + MATRIX], layer[FEED_UP + OUTPUTS], layer[FEED_OUT + INPUTS]
    rows, row_stride = prepared(step, number, layer[FEED_NORM: FEED_NORM + NORM], step[HIDDEN], step[WIDTH], step[WIDTH])
    first, last = share(inputs, PANEL, number, team)
    projected(step, number, matrix, rows, row_stride, step[INNER], stride, first, last)
    if step[GATED]:
        projected(step, number, matrix, rows, row_stride, step[INNER], stride, inputs + first, inputs + last)
    for row in range(step[ROWS]):
        inner = floats(step[INNER] + row * stride * 4, stride)
        gate = inputs if step[GATED] else 0
        for at in range(first, last):
            factor = inner[at] if step[GATED] else np.float32(1)
            value = inner[gate + at]
            if step[ACTIVATION] == SILU:
                inner[at] = factor * value / (np.float32(1) + exponential(-value))
            else:
                inner[at] = factor * value * np.float32(0.5) * (np.float32(1) + error_function(value * ROOT_HALF))


@_compiled
def run_layer(step, number, team, layer, at):
    """Self-attention, cross-attention where there is one, feed-forward, on HIDDEN."""
    width, rows = step[WIDTH], step[ROWS] // step[AT_ONCE]
    heads = step[HEADS] * step[HEAD_DIM]
    project(step, number, team, layer[SELF_NORM: SELF_NORM + NORM], layer[QKV: QKV + MATRIX], step[HIDDEN], width, step[HEADS_IN])
    barrier()
    first, last = share(rows * step[KV_HEADS], 1, number, team)
    for unit in range(first, last):
        attend_to_row(step, number, layer, at, unit // step[KV_HEADS], unit % step[KV_HEADS])
    barrier()
    add_projected(step, number, team, layer[NOTHING: NOTHING + NORM], layer[SELF_OUT: SELF_OUT + MATRIX], step[HEADS_OUT], heads,
                  layer[SELF_AFTER: SELF_AFTER + NORM])
    if step[CROSSES]:
        project(step, number, team, layer[CROSS_NORM: CROSS_NORM + NORM], layer[CROSS_QUERY: CROSS_QUERY + MATRIX], step[HIDDEN],
                width, step[HEADS_IN])
        barrier()
        first, last = share(rows * step[HEADS], 1, number, team)
        for unit in range(first, last):
            attend_to_caption(step, number, layer, at, unit // step[HEADS], unit % step[HEADS])
        barrier()
        add_projected(step, number, team, layer[NOTHING: NOTHING + NORM], layer[CROSS_OUT: CROSS_OUT + MATRIX], step[HEADS_OUT], heads,
                      layer[CROSS_AFTER: CROSS_AFTER + NORM])
    feed(step, number, team, layer)
    barrier()
    add_projected(step, number, team, layer[FEED_INNER: FEED_INNER + NORM], layer[FEED_OUT: FEED_OUT + MATRIX], step[INNER],
                  layer[FEED_UP + OUTPUTS], layer[FEED_AFTER: FEED_AFTER + NORM])


@_compiled
def run_step(step):
    """All layers on HIDDEN, then LOGITS."""
    number, team = thread_number(), team_size()
    layers = longs(step[LAYERS], step[LAYER_COUNT] * LAYER)
    for at in range(step[LAYER_COUNT]):
        run_layer(step, number, team, layers[at * LAYER: (at + 1) * LAYER], at)
    project(step, number, team, step[FINAL_NORM: FINAL_NORM + NORM], step[TO_LOGITS: TO_LOGITS + MATRIX], step[HIDDEN],
            step[WIDTH], step[LOGITS])


@lru_cache(maxsize=1)
def step_function() -> Any:
    """`run_step` as a C function of the address of a table; compiled, or as it was compiled before on this machine.

    Numba keeps compiled code by the source of one function; the sources of all that it calls are made part of it here.
    """
    library()
    version = _version()

    def step(table):
        if version:
            run_step(carray(table, (STEP,)))

    return cfunc(types.void(types.CPointer(types.int64)), error_model="numpy", nogil=True, fastmath=True, cache=True)(step)


def _version() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()
