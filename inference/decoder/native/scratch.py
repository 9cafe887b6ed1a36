"""Scratch memory of each thread of a compiled step."""

# Axes: M rows of the stream, I inputs of the widest matrix, S slots, T text slots

from __future__ import annotations

from inference.decoder.native import tables as t
from inference.decoder.native.basics import compiled_part

CACHE_LINE = 16  # numbers of 32 bits


def scratch_numbers(rows: int, inputs: int, scores: int) -> int:
    """Size of one thread's scratch memory, in numbers of 32 bits, as `thread_scratch` divides it.

    Rounded up to whole cache lines, as threads that write to the same line slow each other down.
    """
    largest = rows
    normed = rows * inputs
    rounded = rows * (inputs + 1) // 2 + 1
    total = largest + normed + rounded + scores
    return -(-total // CACHE_LINE) * CACHE_LINE


@compiled_part
def thread_scratch(step, thread):
    """Addresses of a thread's largest sizes [M], normed and int16 rows [M, I], scores [S or T]."""
    start = step[t.SCRATCH] + thread * step[t.SCRATCH_BYTES]
    normed = start + step[t.ROWS] * 4
    rounded = normed + step[t.ROWS] * step[t.MAX_INPUTS] * 4
    return start, normed, rounded, rounded + step[t.ROWS] * step[t.MAX_INPUTS] * 2
