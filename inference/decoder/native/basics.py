"""Building blocks of compiled steps: arrays at addresses, work shares, scalar functions, norms."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
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
# Sums may be added in any order; NaN and infinity keep their meaning (no nnan, no ninf), so that a
# broken row shows.
REASSOCIATED = {"contract", "reassoc", "arcp", "nsz"}
_options: Any = {"error_model": "numpy", "nogil": True,
                 "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled_part = njit(fastmath=REASSOCIATED, **_options)


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Give one of several functions that are made by the same code a name of its own.

    Numba names machine code by a function's name, argument types and a number that counts within a
    process. Code from the disk cache has another process's numbers, and of two functions with one
    name the linker takes the first for both.
    """
    function.__name__ = name
    function.__qualname__ = name
    return function


def _pointer_to(number: Any, bits: ir.Type) -> Any:
    """Make an intrinsic that turns an int64 address into a typed pointer; Numba has none."""
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        """The address as a pointer."""
        def generate(context: Any, builder: ir.IRBuilder, signature: Any,
                     values: list[ir.Value]) -> ir.Value:
            return builder.inttoptr(values[0], bits.as_pointer())
        return types.CPointer(number)(types.int64), generate
    return pointer


_float32_pointer = _pointer_to(types.float32, ir.FloatType())
_int64_pointer = _pointer_to(types.int64, ir.IntType(64))
_int32_pointer = _pointer_to(types.int32, ir.IntType(32))
_int16_pointer = _pointer_to(types.int16, ir.IntType(16))
_uint8_pointer = _pointer_to(types.uint8, ir.IntType(8))


# Arrays [count] over memory at an address, without bounds checks


@compiled_part
def float32_at(address, count):
    return carray(_float32_pointer(address), (count,))


@compiled_part
def int64_at(address, count):
    return carray(_int64_pointer(address), (count,))


@compiled_part
def int32_at(address, count):
    return carray(_int32_pointer(address), (count,))


@compiled_part
def int16_at(address, count):
    return carray(_int16_pointer(address), (count,))


@compiled_part
def uint8_at(address, count):
    return carray(_uint8_pointer(address), (count,))


@compiled_part
def thread_share(count, unit, thread, threads):
    """One thread's range (first, end) of `count` things, cut at multiples of `unit`."""
    units = (count + unit - 1) // unit
    first = min(units * thread // threads * unit, count)
    return first, min(units * (thread + 1) // threads * unit, count)


@njit(fastmath={"contract"}, error_model="numpy")
def exponential(x):
    """e^x to 2e-7 of its value, x clamped to [-87, 88]: 2^k times a polynomial (Cephes' expf)."""
    nan_of_x = x - x  # 0, or NaN for NaN, which min and max below would lose
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

    # the bits of a float32 with this exponent and no fraction: 2^power
    exponent_bits = np.int32((np.int32(power) + np.int32(127)) << np.int32(23))
    return result * exponent_bits.view(np.float32) + nan_of_x


@njit(fastmath={"contract"}, error_model="numpy")
def error_function(x):
    """erf to 5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
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
def maximum(values, count):
    """The largest value; if one is NaN, any of them."""
    most = values[0]
    for at in range(count):
        most = max(most, values[at])
    return most


@njit(fastmath=True, **_options)
def largest_magnitude(values, count):
    """The largest absolute value, at least 1e-30, so that dividing by it is safe."""
    most = np.float32(1e-30)
    for at in range(count):
        most = max(most, abs(values[at]))
    return most


@compiled_part
def normalize(source, target, count, kind, gain, epsilon):
    """target = RMS norm (see `tables` for its gain) or layer norm of source; may be one array."""
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
    """Hash of all sources of this folder, for the key of compiled code on disk.

    Numba checks only the file of the compiled function itself; a change in another file here must
    recompile it as well.
    """
    folder = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()
