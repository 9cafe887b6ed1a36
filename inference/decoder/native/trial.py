"""Products of some matrices with some rows in one call, for calibration: what a step's matrices would take."""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from inference.decoder.native.basics import share, version
from inference.decoder.native.products import PANEL, multiply_floats, multiply_integers
from inference.decoder.native.threads import barrier, compiled, run, team_size, thread_number

COUNT, ROWS, INPUTS, OUTPUTS, X, OUT, MATRICES = range(7)


@lru_cache(maxsize=2)
def _function(int8: bool) -> Any:
    source, multiply = version(), multiply_integers if int8 else multiply_floats

    def trial(pointer):
        if source:
            table = carray(pointer, (MATRICES,))
            matrices = carray(pointer, (MATRICES + table[COUNT],))
            number, team = thread_number(), team_size()
            sizes = (table[INPUTS], table[INPUTS], table[OUTPUTS])
            for at in range(table[COUNT]):
                span = share(table[OUTPUTS], PANEL, number, team)
                multiply(matrices[MATRICES + at], table[X], table[OUT], span, table[ROWS], sizes)
                barrier()

    return compiled(trial)


def products(matrices: Sequence[Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A call that multiplies all of matrices [O, I], float32 or int8, with x [M, I], float32 or int16 -> the last product
    [M, O], float32 or int32."""
    rows, (outputs, inputs) = len(x), matrices[0].shape
    int8 = matrices[0].dtype == torch.int8
    out = torch.empty(rows, outputs, dtype=torch.int32 if int8 else torch.float32)
    table = np.array([len(matrices), rows, inputs, outputs, x.data_ptr(), out.data_ptr(),
                      *(matrix.data_ptr() for matrix in matrices)], dtype=np.int64)
    address, kept = _function(int8).address, (matrices, x)

    def call() -> Tensor:
        assert kept  # the table holds their addresses alone
        run(address, table.ctypes.data, torch.get_num_threads())
        return out

    return call
