"""What compiled steps are built of: arrays at addresses, shares of work, norms, functions of one number."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from inference.decoder.native.tables import RMS

LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
ROOT_HALF = np.float32(math.sqrt(0.5))
REASSOCIATED = {"contract", "reassoc", "arcp", "nsz"}  # sums in any order; what is not a number stays so
_options: Any = {"error_model": "numpy", "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled_part = njit(fastmath=REASSOCIATED, **_options)


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


@compiled_part
def floats(address, count):
    return carray(_float_pointer(address), (count,))


@compiled_part
def longs(address, count):
    return carray(_long_pointer(address), (count,))


@compiled_part
def ints(address, count):
    return carray(_int_pointer(address), (count,))


@compiled_part
def shorts(address, count):
    return carray(_short_pointer(address), (count,))


@compiled_part
def whole_bytes(address, count):
    return carray(_byte_pointer(address), (count,))


@compiled_part
def share(count, unit, number, team):
    """The part of `count` things, in units, that thread `number` of a team does."""
    units = (count + unit - 1) // unit
    return min(units * number // team * unit, count), min(units * (number + 1) // team * unit, count)


@njit(fastmath={"contract"}, error_model="numpy")
def exponential(x):
    """e to the x, to 2e-7 of its value, for x from -87 to 88 (and at these beyond them): 2 to a whole number times a polynomial
    (Cephes' expf)."""
    nothing = x - x  # but not where x is no number
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    power = np.floor(x * LOG2_E + np.float32(0.5))
    rest = x - power * LN_2
    result = np.float32(1.9875691500e-4)
    result = result * rest + np.float32(1.3981999507e-3)
    result = result * rest + np.float32(8.3334519073e-3)
    result = result * rest + np.float32(4.1665795894e-2)
    result = result * rest + np.float32(1.6666665459e-1)
    result = result * rest + np.float32(5.0000001201e-1)
    result = result * rest * rest + rest + np.float32(1.0)
    return result * np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32) + nothing


@njit(fastmath={"contract"}, error_model="numpy")
def error_function(x):
    """erf, to 5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size = abs(x)
    part = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * size)
    series = np.float32(1.061405429)
    series = series * part - np.float32(1.453152027)
    series = series * part + np.float32(1.421413741)
    series = series * part - np.float32(0.284496736)
    series = series * part + np.float32(0.254829592)
    result = np.float32(1) - series * part * exponential(-size * size)
    return result if x >= 0 else -result


@njit(fastmath=True, **_options)
def largest(values, count):
    """Any of them where one is no number."""
    most = values[0]
    for at in range(count):
        most = max(most, values[at])
    return most


@njit(fastmath=True, **_options)
def largest_size(values, count):
    most = np.float32(1e-30)
    for at in range(count):
        most = max(most, abs(values[at]))
    return most


@compiled_part
def normed(source, target, count, kind, gain, epsilon):
    """target = the norm of source: RMS (gain holds the root of the width, epsilon the width too) or layer norm."""
    if kind == RMS:
        total = np.float32(0)
        for at in range(count):
            total += source[at] * source[at]
        factor = np.float32(1) / max(np.sqrt(total + epsilon), np.float32(1e-12))
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
    factor = np.float32(1) / np.sqrt(spread / np.float32(count) + epsilon)
    for at in range(count):
        target[at] = (source[at] - mean) * factor * gain[at]


@lru_cache(maxsize=1)
def version() -> str:
    """Of all sources here. Numba keeps compiled code by the source of one function alone; this makes the others part of it."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()
