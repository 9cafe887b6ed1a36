"""Products of a matrix with a few rows at the speed of memory, as LLVM code that Numba compiles.

BLAS libraries are made for many rows; with one to eight they reach a fifth of what the processor
can do, and what limits a decoder's step is how fast its matrices are read. Here a panel of four
outputs is computed at once for up to four rows: each number of the matrix is read once, the next
panels are prefetched, and sums stay in registers.

A row's sums are added in one order, whatever the number of rows, so that its result is the same to
the last bit.
"""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from inference.decoder.native.basics import named
from inference.decoder.native.instructions import (
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    bytes_of,
    declare,
    load,
    pointer_to,
    prefetch,
    splat,
)

PANEL = 4  # outputs
PREFETCHED_PANELS = 3  # distance between a panel and the one that is prefetched
_FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_AVX512 = bool(_FEATURES.get("avx512f"))
LANES = 16 if HAS_AVX512 else 8
"""Numbers of 32 bits in a vector. A vector wider than the processor's would only be split."""
MOST_ROWS = 4 if HAS_AVX512 else 2  # of one product: PANEL * MOST_ROWS sums must stay in registers


class _Format:
    """Number types of a matrix, its inputs and its sums, and how products are added up.

    name: of the functions that are made for it.
    step: inputs that one vector instruction takes.
    """

    def __init__(self, name: str, matrix: ir.Type, row: ir.Type, total: ir.Type, step: int) -> None:
        self.name = name
        self.matrix = matrix
        self.row = row
        self.total = total
        self.step = step
        self.sums = ir.VectorType(total, LANES)

    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value,
                    row: ir.Value) -> ir.Value:
        """sums + matrix * row, all vectors."""
        raise NotImplementedError


class _Floats(_Format):
    """float32 by float32, fused multiply-add."""

    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value,
                    row: ir.Value) -> ir.Value:
        product = builder.fmul(matrix, row, flags=("contract",))
        return builder.fadd(sums, product, flags=("contract",))


class _Integers(_Format):
    """int8 by int16 into int32, neighbours added: exact."""

    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value,
                    row: ir.Value) -> ir.Value:
        matrix = builder.sext(matrix, ir.VectorType(INT16, self.step))
        if HAS_AVX512 and _FEATURES.get("avx512vnni"):
            # one instruction multiplies, adds neighbours and accumulates
            inputs = [sums, builder.bitcast(matrix, self.sums), builder.bitcast(row, self.sums)]
            types_in = [value.type for value in inputs]
            dot = declare(builder, "llvm.x86.avx512.vpdpwssd.512", self.sums, types_in)
            return builder.call(dot, inputs)

        wide = ir.VectorType(INT32, self.step)
        product = builder.mul(builder.sext(matrix, wide), builder.sext(row, wide))
        halves = []
        for first in (0, 1):  # even and odd lanes
            lanes = ir.Constant(ir.VectorType(INT32, LANES), list(range(first, self.step, 2)))
            halves.append(builder.shuffle_vector(product, product, lanes))
        return builder.add(sums, builder.add(*halves))


FLOATS = _Floats("floats", FLOAT, FLOAT, FLOAT, LANES)
INTEGERS = _Integers("integers", INT8, INT16, INT32, 2 * LANES)


def _make_product(kind: _Format, rows: int, outputs: int, prefetch: bool) -> Callable[..., None]:
    """Make the product of `outputs` outputs and `rows` rows. prefetch: the panels after it."""

    @intrinsic
    def product(context: Any, matrix: Any, row: Any, out: Any, inputs: Any, row_stride: Any,
                out_stride: Any) -> Any:
        """Addresses of a panel [outputs, I], rows and out; strides of rows and out in numbers."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any,
                     values: list[ir.Value]) -> ir.Value:
            _write_product(builder, _Product(kind, rows, outputs, prefetch, *values))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return product


@dataclass(frozen=True)
class _Product:
    """One product to generate code for: its sizes, and its arguments as LLVM values."""

    kind: _Format
    rows: int
    outputs: int
    prefetch: bool
    matrix: ir.Value
    row: ir.Value
    out: ir.Value
    inputs: ir.Value
    row_stride: ir.Value
    out_stride: ir.Value


def _write_product(builder: ir.IRBuilder, product: _Product) -> None:
    """Write the loop over inputs, the inputs that are left, and the totals."""
    kind = product.kind
    zero = ir.Constant(kind.sums, None)
    # one vector of partial sums per row and output; LLVM turns these stack slots into registers
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(product.outputs)]
            for _ in range(product.rows)]
    for row_sums in sums:
        for slot in row_sums:
            builder.store(zero, slot)

    step = INT64(kind.step)
    whole = builder.mul(builder.udiv(product.inputs, step), step)
    with cgutils.for_range_slice(builder, INT64(0), whole, step, intp=INT64) as (start, _):
        _add_step(builder, product, sums, start, None)

    with builder.if_then(builder.icmp_unsigned("<", whole, product.inputs)):
        lanes = ir.Constant(ir.VectorType(INT64, kind.step), list(range(kind.step)))
        left = splat(builder, builder.sub(product.inputs, whole), kind.step)
        _add_step(builder, product, sums, whole, builder.icmp_unsigned("<", lanes, left))

    for row, row_sums in enumerate(sums):
        totals = _reduce(builder, [builder.load(slot) for slot in row_sums], kind)
        offset = builder.mul(product.out_stride, INT64(row))
        target = pointer_to(builder, product.out, offset, kind.total)
        builder.store(totals, builder.bitcast(target, totals.type.as_pointer()), align=4)


def _add_step(builder: ir.IRBuilder, product: _Product, sums: list[list[ir.Value]], at: ir.Value,
              mask: ir.Value | None) -> None:
    """Add products of the inputs from index `at` to all sums. mask: lanes to read; None = all."""
    kind = product.kind
    panel = []
    for output in range(product.outputs):
        start = builder.add(builder.mul(product.inputs, INT64(output)), at)
        pointer = pointer_to(builder, product.matrix, start, kind.matrix)
        if product.prefetch and mask is None:
            distance = builder.mul(product.inputs, INT64(PREFETCHED_PANELS * PANEL))
            ahead = builder.add(start, distance)
            prefetch(builder, pointer_to(builder, product.matrix, ahead, kind.matrix))
        panel.append(load(builder, pointer, kind.matrix, kind.step, mask))

    for row, row_sums in enumerate(sums):
        start = builder.add(builder.mul(product.row_stride, INT64(row)), at)
        pointer = pointer_to(builder, product.row, start, kind.row)
        values = load(builder, pointer, kind.row, kind.step, mask)
        for slot, weights in zip(row_sums, panel, strict=True):
            builder.store(kind.add_product(builder, builder.load(slot), weights, values), slot)


def _reduce(builder: ir.IRBuilder, sums: list[ir.Value], kind: _Format) -> ir.Value:
    """The total of each vector, by adding halves to halves until one number is left.

    Four vectors become one that holds four totals; a single vector is added up in the same order.
    """
    add = builder.add if kind.total is INT32 else builder.fadd
    width, blocks = LANES, 1  # a vector holds `blocks` blocks of `width` lanes, one block per total
    while width > 1:
        half = width // 2
        if len(sums) > 1:
            pairs = [(sums[at], sums[at + 1]) for at in range(0, len(sums), 2)]
            blocks *= 2
        else:
            pairs = [(sums[0], sums[0])]

        lanes = [block * width + lane for block in range(blocks) for lane in range(half)]
        indices = ir.VectorType(INT32, len(lanes))
        low = ir.Constant(indices, lanes)
        high = ir.Constant(indices, [lane + half for lane in lanes])
        sums = [add(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high))
                for a, b in pairs]
        width = half
    return sums[0]


def _make_multiply(kind: _Format) -> Callable[..., None]:
    """Make the product of a span of outputs and any number of rows from those of 4, 2, 1 rows."""
    four, two, one = (_make_product(kind, rows, PANEL, False) for rows in (4, 2, 1))
    # a panel's first product reads it from memory and prefetches; the later ones find it in the
    # cache
    first_four, first_two, first_one = (
        _make_product(kind, rows, PANEL, True) for rows in (4, 2, 1))
    rest = _make_product(kind, 1, 1, False)
    matrix_bytes, row_bytes = bytes_of(kind.matrix), bytes_of(kind.row)
    most = MOST_ROWS

    def multiply(matrix: int, rows: int, out: int, span: tuple[int, int], count: int,
                 sizes: tuple[int, int, int]) -> None:
        """out[m, o] = sum of matrix[o, i] * rows[m, i] over i, for `count` rows and the outputs
        from span[0] to span[1].

        matrix [O, I], rows and out are addresses. sizes: I, and the strides of rows and out, in
        numbers.
        """
        inputs, row_stride, out_stride = sizes
        output = span[0]
        while output + PANEL <= span[1]:
            panel, to = matrix + output * inputs * matrix_bytes, out + output * 4
            row = 0
            if most >= 4 and count >= 4:
                first_four(panel, rows, to, inputs, row_stride, out_stride)
                row = 4
            elif count >= 2:
                first_two(panel, rows, to, inputs, row_stride, out_stride)
                row = 2
            else:
                first_one(panel, rows, to, inputs, row_stride, out_stride)
                row = 1
            while most >= 4 and row + 4 <= count:
                four(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4,
                     inputs, row_stride, out_stride)
                row += 4
            while row + 2 <= count:
                two(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4,
                    inputs, row_stride, out_stride)
                row += 2
            if row < count:
                one(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4,
                    inputs, row_stride, out_stride)
            output += PANEL

        # outputs that do not fill a panel, one by one
        while output < span[1]:
            for row in range(count):
                rest(matrix + output * inputs * matrix_bytes, rows + row * row_stride * row_bytes,
                     out + (row * out_stride + output) * 4, inputs, row_stride, out_stride)
            output += 1

    return njit(error_model="numpy", nogil=True)(named(multiply, f"multiply_{kind.name}"))


multiply_floats = _make_multiply(FLOATS)
multiply_integers = _make_multiply(INTEGERS)
