"""LLVM instructions on numbers at raw addresses, for the code that `products` generates."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()


def declare(builder: ir.IRBuilder, name: str, result: ir.Type,
            inputs: list[ir.Type]) -> ir.Function:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, inputs), name)


def pointer_to(builder: ir.IRBuilder, address: ir.Value, index: ir.Value,
               number: ir.Type) -> ir.Value:
    """Pointer to number `index` of the array at an address."""
    return builder.gep(builder.inttoptr(address, number.as_pointer()), [index], source_etype=number)


def load(builder: ir.IRBuilder, pointer: ir.Value, number: ir.Type, count: int,
         mask: ir.Value | None) -> ir.Value:
    """Load `count` numbers; those left out by the mask are 0, and their memory is not read."""
    vector = ir.VectorType(number, count)
    pointer = builder.bitcast(pointer, vector.as_pointer())
    if mask is None:
        return builder.load(pointer, align=bytes_of(number), typ=vector)

    letter = "i" if isinstance(number, ir.IntType) else "f"
    name = f"llvm.masked.load.v{count}{letter}{8 * bytes_of(number)}.p0"
    function = declare(builder, name, vector, [pointer.type, INT32, mask.type, vector])
    zeros = ir.Constant(vector, None)
    return builder.call(function, [pointer, INT32(bytes_of(number)), mask, zeros])


def prefetch(builder: ir.IRBuilder, pointer: ir.Value) -> None:
    pointer = builder.bitcast(pointer, INT8.as_pointer())
    types_in = [pointer.type, INT32, INT32, INT32]
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), types_in)
    for_reading, into_second_cache, data = INT32(0), INT32(2), INT32(1)
    builder.call(function, [pointer, for_reading, into_second_cache, data])


def splat(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """A vector of `count` copies of a value."""
    vector = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, INT32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(INT32, count), [0] * count))


def bytes_of(number: ir.Type) -> int:
    return number.width // 8 if isinstance(number, ir.IntType) else 4
