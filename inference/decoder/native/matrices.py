"""Projections of the compiled step: norm, matrix product and bias of a thread's outputs."""

# Axes: M rows of the stream, I inputs, O outputs, S slots, T text slots

from __future__ import annotations

import numpy as np

from inference.decoder.native import tables as t
from inference.decoder.native.basics import (
    compiled_part,
    float32_at,
    int16_at,
    int32_at,
    largest_magnitude,
    normalize,
    thread_share,
)
from inference.decoder.native.products import PANEL, multiply_floats, multiply_integers
from inference.decoder.native.scratch import thread_scratch
from inference.decoder.native.threads import barrier


@compiled_part
def matrix_of(table, offset):
    return table[offset: offset + t.MATRIX_SIZE]


@compiled_part
def norm_of(table, offset):
    return table[offset: offset + t.NORM_SIZE]


@compiled_part
def apply_norm(norm, source, target, count):
    """target = norm of source, with the bias that layer norms may have."""
    epsilon = np.int32(norm[t.EPSILON]).view(np.float32)
    normalize(source, target, count, norm[t.KIND], float32_at(norm[t.GAIN], count), epsilon)
    if norm[t.NORM_BIAS]:
        bias = float32_at(norm[t.NORM_BIAS], count)
        for at in range(count):
            target[at] += bias[at]


@compiled_part
def prepare_inputs(step, thread, norm, source, stride, inputs):
    """Normalize rows [M, I] at `source`, round them for int8 matrices -> (address, stride).

    Every thread does this for all rows in its own scratch memory, so that no barrier is needed
    before the product.
    """
    largest_at, normed_at, rounded_at, _ = thread_scratch(step, thread)
    if norm[t.KIND] != t.NO_NORM:
        for row in range(step[t.ROWS]):
            values = float32_at(source + row * stride * 4, inputs)
            apply_norm(norm, values, float32_at(normed_at + row * inputs * 4, inputs), inputs)
        source, stride = normed_at, inputs
    if not step[t.INT8]:
        return source, stride

    largest = float32_at(largest_at, step[t.ROWS])
    for row in range(step[t.ROWS]):
        values = float32_at(source + row * stride * 4, inputs)
        # 0, or NaN for a row with NaN or infinity in it, which largest_magnitude may lose
        nan_of_row = np.float32(0)
        for at in range(inputs):
            nan_of_row += values[at] * np.float32(0)
        largest[row] = largest_magnitude(values, inputs) + nan_of_row
        factor = np.float32(127) / largest[row]
        rounded = int16_at(rounded_at + row * inputs * 2, inputs)
        for at in range(inputs):
            rounded[at] = np.int16(np.rint(values[at] * factor))
    return rounded_at, inputs


@compiled_part
def multiply_prepared(step, thread, matrix, rows, stride, out, out_stride, first, end):
    """Outputs first .. end - 1 of `matrix`, with bias, for prepared rows -> out [M, out_stride]."""
    sizes = (matrix[t.INPUTS], stride, out_stride)
    if step[t.INT8]:
        multiply_integers(matrix[t.WEIGHT], rows, out, (first, end), step[t.ROWS], sizes)
        largest = float32_at(thread_scratch(step, thread)[0], step[t.ROWS])
        scale = float32_at(matrix[t.SCALE], end)
        for row in range(step[t.ROWS]):
            # the integer sums are replaced in place by what they stand for
            sums = int32_at(out + row * out_stride * 4, end)
            values = float32_at(out + row * out_stride * 4, end)
            for at in range(first, end):
                values[at] = np.float32(sums[at]) * scale[at] * largest[row]
    else:
        multiply_floats(matrix[t.WEIGHT], rows, out, (first, end), step[t.ROWS], sizes)

    if matrix[t.BIAS]:
        bias = float32_at(matrix[t.BIAS], end)
        for row in range(step[t.ROWS]):
            values = float32_at(out + row * out_stride * 4, end)
            for at in range(first, end):
                values[at] += bias[at]


@compiled_part
def project(step, thread, threads, norm, matrix, source, stride, out):
    """out [M, O] = matrix * norm(source): the thread's share of outputs."""
    rows, row_stride = prepare_inputs(step, thread, norm, source, stride, matrix[t.INPUTS])
    first, end = thread_share(matrix[t.OUTPUTS], PANEL, thread, threads)
    multiply_prepared(step, thread, matrix, rows, row_stride, out, matrix[t.OUTPUTS], first, end)


@compiled_part
def project_and_add(step, thread, threads, norm, matrix, source, stride, norm_after):
    """HIDDEN += norm_after(matrix * norm(source)), then a barrier."""
    width = step[t.WIDTH]
    rows, row_stride = prepare_inputs(step, thread, norm, source, stride, matrix[t.INPUTS])
    first, end = thread_share(width, PANEL, thread, threads)
    multiply_prepared(step, thread, matrix, rows, row_stride, step[t.PROJECTED], width, first, end)

    # without a norm after, a thread adds its own outputs of all rows; with one, which needs whole
    # rows, all of its own rows
    own_rows = 0, step[t.ROWS]
    if norm_after[t.KIND] != t.NO_NORM:
        barrier()
        own_rows = thread_share(step[t.ROWS], 1, thread, threads)
        first, end = 0, width
    for row in range(own_rows[0], own_rows[1]):
        hidden = float32_at(step[t.HIDDEN] + row * width * 4, width)
        values = float32_at(step[t.PROJECTED] + row * width * 4, width)
        if norm_after[t.KIND] != t.NO_NORM:
            apply_norm(norm_after, values, values, width)
        for at in range(first, end):
            hidden[at] += values[at]
    barrier()
