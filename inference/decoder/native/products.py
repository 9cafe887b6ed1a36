"""Products of a matrix with a few rows at the speed of memory, as LLVM vector code that Numba compiles.

BLAS libraries are made for many rows; with one to eight they reach a fifth of what the processor can do, and what limits a
decoder's step is how fast its matrices are read. Here a panel of four outputs is worked through at once, for up to four rows:
each number of the matrix is read once, the next panels are asked for ahead of time, and sums stay in registers.

A row's sums are added in one order, whatever the number of rows, so that its result is the same to the last bit.
"""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

PANEL = 4  # outputs
AHEAD = 3  # panels
INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FEATURES = llvmlite.binding.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f"))
LANES = 16 if WIDE else 8
"""Numbers of 32 bits in a vector. More than the processor has would only be split."""
MOST_ROWS = 4 if WIDE else 2  # of one product: PANEL * MOST_ROWS sums must stay in registers


class _Kind:
    """How a matrix and its inputs lie in memory: the numbers a step takes, and how they are multiplied and added."""

    def __init__(self, matrix: ir.Type, row: ir.Type, total: ir.Type, step: int) -> None:
        self.matrix, self.row, self.total, self.step = matrix, row, total, step
        self.sums = ir.VectorType(total, LANES)

    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value, row: ir.Value) -> ir.Value:
        """sums + matrix * row, vectors."""
        raise NotImplementedError


class _Floats(_Kind):
    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value, row: ir.Value) -> ir.Value:
        return builder.fadd(sums, builder.fmul(matrix, row, flags=("contract",)), flags=("contract",))


class _Integers(_Kind):
    """Bytes by 16-bit numbers into 32 bits, neighbours added: exact."""

    def add_product(self, builder: ir.IRBuilder, sums: ir.Value, matrix: ir.Value, row: ir.Value) -> ir.Value:
        matrix = builder.sext(matrix, ir.VectorType(ir.IntType(16), self.step))
        if WIDE and _FEATURES.get("avx512vnni"):
            name, inputs = "llvm.x86.avx512.vpdpwssd.512", [sums, builder.bitcast(matrix, self.sums),
                                                            builder.bitcast(row, self.sums)]
            return builder.call(_declared(builder, name, self.sums, [value.type for value in inputs]), inputs)
        wide = ir.VectorType(INT32, self.step)
        both = builder.mul(builder.sext(matrix, wide), builder.sext(row, wide))
        halves = [builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(INT32, LANES), list(range(at, self.step, 2))))
                  for at in (0, 1)]
        return builder.add(sums, builder.add(*halves))


FLOATS = _Floats(FLOAT, FLOAT, FLOAT, LANES)
INTEGERS = _Integers(ir.IntType(8), ir.IntType(16), INT32, 2 * LANES)


def _declared(builder: ir.IRBuilder, name: str, result: ir.Type, inputs: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, inputs), name)


def _make_product(kind: _Kind, rows: int, outputs: int, ahead: bool) -> Callable[..., None]:
    """The product of `outputs` outputs with `rows` rows; ahead: it also asks for the panels after this one."""

    @intrinsic
    def product(context: Any, matrix: Any, row: Any, out: Any, inputs: Any, row_stride: Any, out_stride: Any) -> Any:
        """Addresses of a panel [outputs, I], of rows [rows, row_stride] and of out [rows, out_stride]; strides in numbers."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
            _write_product(builder, _Work(kind, rows, outputs, ahead, *values))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return product


class _Work:
    """One product being written: its sizes, and the values it is given."""

    def __init__(self, kind: _Kind, rows: int, outputs: int, ahead: bool, matrix: ir.Value, row: ir.Value, out: ir.Value,
                 inputs: ir.Value, row_stride: ir.Value, out_stride: ir.Value) -> None:
        self.kind, self.rows, self.outputs, self.ahead = kind, rows, outputs, ahead
        self.matrix, self.row, self.out = matrix, row, out
        self.inputs, self.row_stride, self.out_stride = inputs, row_stride, out_stride


def _write_product(builder: ir.IRBuilder, work: _Work) -> None:
    kind = work.kind
    zero = ir.Constant(kind.sums, None)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(work.outputs)] for _ in range(work.rows)]
    for at in (slot for row in sums for slot in row):
        builder.store(zero, at)
    step = INT64(kind.step)
    whole = builder.mul(builder.udiv(work.inputs, step), step)
    with cgutils.for_range_slice(builder, INT64(0), whole, step, intp=INT64) as (at, _):
        _add_step(builder, work, sums, at, None)
    with builder.if_then(builder.icmp_unsigned("<", whole, work.inputs)):
        lanes = ir.Constant(ir.VectorType(INT64, kind.step), list(range(kind.step)))
        left = _splat(builder, builder.sub(work.inputs, whole), kind.step)
        _add_step(builder, work, sums, whole, builder.icmp_unsigned("<", lanes, left))
    for row, slots in enumerate(sums):
        totals = _totals(builder, [builder.load(slot) for slot in slots], kind)
        start = _address(builder, work.out, builder.mul(work.out_stride, INT64(row)), kind.total)
        builder.store(totals, builder.bitcast(start, totals.type.as_pointer()), align=4)


def _add_step(builder: ir.IRBuilder, work: _Work, sums: list[list[ir.Value]], at: ir.Value, mask: ir.Value | None) -> None:
    kind = work.kind
    matrix = []
    for output in range(work.outputs):
        start = builder.add(builder.mul(work.inputs, INT64(output)), at)
        pointer = _address(builder, work.matrix, start, kind.matrix)
        if work.ahead and mask is None:
            beyond = builder.add(start, builder.mul(work.inputs, INT64(AHEAD * PANEL)))
            _ask_for(builder, _address(builder, work.matrix, beyond, kind.matrix))
        matrix.append(_loaded(builder, pointer, kind.matrix, kind.step, mask))
    for row, slots in enumerate(sums):
        start = builder.add(builder.mul(work.row_stride, INT64(row)), at)
        values = _loaded(builder, _address(builder, work.row, start, kind.row), kind.row, kind.step, mask)
        for slot, numbers in zip(slots, matrix, strict=True):
            builder.store(kind.add_product(builder, builder.load(slot), numbers, values), slot)


def _address(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, number: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, number.as_pointer()), [index], source_etype=number)


def _loaded(builder: ir.IRBuilder, pointer: ir.Value, number: ir.Type, count: int, mask: ir.Value | None) -> ir.Value:
    """`count` numbers, those beyond the mask 0 and not read."""
    vector = ir.VectorType(number, count)
    pointer = builder.bitcast(pointer, vector.as_pointer())
    bits = number.width if isinstance(number, ir.IntType) else 32
    if mask is None:
        return builder.load(pointer, align=bits // 8, typ=vector)
    name = f"llvm.masked.load.v{count}{'i' if isinstance(number, ir.IntType) else 'f'}{bits}.p0"
    load = _declared(builder, name, vector, [pointer.type, INT32, mask.type, vector])
    return builder.call(load, [pointer, INT32(bits // 8), mask, ir.Constant(vector, None)])


def _ask_for(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    ask = _declared(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, INT32, INT32, INT32])
    builder.call(ask, [pointer, INT32(0), INT32(2), INT32(1)])  # to read, into the second cache, data


def _splat(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    vector = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, count), [0] * count))


def _totals(builder: ir.IRBuilder, sums: list[ir.Value], kind: _Kind) -> ir.Value:
    """The total of each vector: halves added to halves until one number is left, in the same order for one and for four."""
    add = builder.add if kind.total is INT32 else builder.fadd
    width, blocks = LANES, 1  # each vector holds `blocks` blocks of `width` lanes, a block a total
    while width > 1:
        half, pairs = width // 2, [(sums[0], sums[0])]
        if len(sums) > 1:
            pairs, blocks = [(sums[at], sums[at + 1]) for at in range(0, len(sums), 2)], 2 * blocks
        lanes = [block * width + lane for block in range(blocks) for lane in range(half)]
        low, high = (ir.Constant(ir.VectorType(INT32, len(lanes)), [at + more for at in lanes]) for more in (0, half))
        sums, width = [add(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in pairs], half
    return sums[0]


def _make_multiply(kind: _Kind) -> Callable[..., None]:
    four, two, one = (_make_product(kind, rows, PANEL, False) for rows in (4, 2, 1))
    first_four, first_two, first_one = (_make_product(kind, rows, PANEL, True) for rows in (4, 2, 1))
    rest = _make_product(kind, 1, 1, False)
    matrix_bytes, row_bytes = _bytes(kind.matrix), _bytes(kind.row)
    most = MOST_ROWS

    @njit(error_model="numpy", nogil=True)
    def multiply(matrix: int, rows: int, out: int, span: tuple[int, int], count: int, sizes: tuple[int, int, int]) -> None:
        """out[m, o] = sum of matrix[o, i] * rows[m, i] over i, for `count` rows and the outputs from span[0] to span[1].

        Addresses of matrix [O, I], rows and out; sizes: I, and the strides of rows and out, in numbers.
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
                four(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4, inputs, row_stride, out_stride)
                row += 4
            while row + 2 <= count:
                two(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4, inputs, row_stride, out_stride)
                row += 2
            if row < count:
                one(panel, rows + row * row_stride * row_bytes, to + row * out_stride * 4, inputs, row_stride, out_stride)
            output += PANEL
        while output < span[1]:
            for row in range(count):
                rest(matrix + output * inputs * matrix_bytes, rows + row * row_stride * row_bytes,
                     out + (row * out_stride + output) * 4, inputs, row_stride, out_stride)
            output += 1

    return multiply


def _bytes(number: ir.Type) -> int:
    return number.width // 8 if isinstance(number, ir.IntType) else 4


multiply_floats = _make_multiply(FLOATS)
multiply_integers = _make_multiply(INTEGERS)
