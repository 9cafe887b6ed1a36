"""Products of several matrices with some rows in one call, to calibrate a step's matrices."""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from inference.decoder.native.basics import compiled_part, named, thread_share, version
from inference.decoder.native.products import PANEL, multiply_floats, multiply_integers
from inference.decoder.native.threads import barrier, compiled, run, thread_count, thread_number

COUNT, ROWS, INPUTS, OUTPUTS, X, OUT, MATRICES = range(7)


def _make_multiply_each(multiply: Any, name: str) -> Any:
    def multiply_each(table, matrices):
        """OUT = each of `matrices` times X in turn; threads share the outputs."""
        thread, threads = thread_number(), thread_count()
        sizes = (table[INPUTS], table[INPUTS], table[OUTPUTS])
        for at in range(table[COUNT]):
            span = thread_share(table[OUTPUTS], PANEL, thread, threads)
            multiply(matrices[MATRICES + at], table[X], table[OUT], span, table[ROWS], sizes)
            barrier()

    return compiled_part(named(multiply_each, name))


multiply_each_floats = _make_multiply_each(multiply_floats, "multiply_each_floats")
multiply_each_integers = _make_multiply_each(multiply_integers, "multiply_each_integers")


@lru_cache(maxsize=2)
def trial_function(int8: bool) -> Any:
    """`multiply_each` as a C function of a table's address, compiled or read from the disk cache.

    Captured values are part of the cache key: `version` alone, since a captured function has
    another key in each process.
    """
    source = version()

    def float_trial(pointer):
        if source:
            table = carray(pointer, (MATRICES,))
            multiply_each_floats(table, carray(pointer, (MATRICES + table[COUNT],)))

    def integer_trial(pointer):
        if source:
            table = carray(pointer, (MATRICES,))
            multiply_each_integers(table, carray(pointer, (MATRICES + table[COUNT],)))

    return compiled(integer_trial if int8 else float_trial)


def products(matrices: Sequence[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Return a call that multiplies all of matrices [O, I], float32 or int8, with x [M, I], float32
    or int16.

    The call returns the last product [M, O], float32 or int32.
    """
    rows, (outputs, inputs) = len(x), matrices[0].shape
    int8 = matrices[0].dtype == torch.int8
    out = torch.empty(rows, outputs, dtype=torch.int32 if int8 else torch.float32)
    addresses = [tensor.data_ptr() for tensor in (x, out, *matrices)]
    table = np.array([len(matrices), rows, inputs, outputs, *addresses], dtype=np.int64)
    address = trial_function(int8).address
    kept = (matrices, x)

    def call() -> Tensor:
        assert kept  # the table holds only addresses: the tensors must outlive it
        run(address, table.ctypes.data, torch.get_num_threads())
        return out

    return call
