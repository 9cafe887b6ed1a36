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

from inference.decoder.native.basics import thread_share, version
from inference.decoder.native.products import PANEL, multiply_floats, multiply_integers
from inference.decoder.native.threads import barrier, compiled, run, thread_count, thread_number

COUNT, ROWS, INPUTS, OUTPUTS, X, OUT, MATRICES = range(7)


@lru_cache(maxsize=2)
def _trial_function(int8: bool) -> Any:
    source = version()
    multiply = multiply_integers if int8 else multiply_floats

    def trial(pointer):
        if source:  # a captured value is part of the cache key, see `version`
            table = carray(pointer, (MATRICES,))
            matrices = carray(pointer, (MATRICES + table[COUNT],))
            thread, threads = thread_number(), thread_count()
            sizes = (table[INPUTS], table[INPUTS], table[OUTPUTS])
            for at in range(table[COUNT]):
                span = thread_share(table[OUTPUTS], PANEL, thread, threads)
                multiply(matrices[MATRICES + at], table[X], table[OUT], span, table[ROWS], sizes)
                barrier()

    return compiled(trial)


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
    address = _trial_function(int8).address
    kept = (matrices, x)

    def call() -> Tensor:
        assert kept  # the table holds only addresses: the tensors must outlive it
        run(address, table.ctypes.data, torch.get_num_threads())
        return out

    return call
