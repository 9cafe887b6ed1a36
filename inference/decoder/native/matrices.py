"""Matrix products and norms of the compiled decoder step."""

from __future__ import annotations

import numpy as np

from inference.decoder.native import tables as t
from inference.decoder.native.basics import (
    compiled_part,
    floats,
    ints,
    largest_size,
    normed,
    share,
    shorts,
)
from inference.decoder.native.products import PANEL, multiply_floats, multiply_integers
from inference.decoder.native.threads import barrier


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
