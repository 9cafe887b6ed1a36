"""PyTorch's own threads for compiled steps: one parallel region of its OpenMP library, with barriers inside.

A second pool of threads beside PyTorch's would fight it for the processor: OpenMP's threads wait by spinning. So a step runs
on the pool that is there, and a step of a hundred parts pays for one start and a hundred barriers (a microsecond each).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llvmlite.binding
import torch
from numba import cfunc, types

LIBRARY = "libgomp.so.1"  # by this name the loader gives what PyTorch has already loaded
_NAMES = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
team_size = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())
"""Wait until every thread of the team is here."""


@lru_cache(maxsize=1)
def library() -> Any | None:
    """The OpenMP library that PyTorch runs on, its names known to the compiler; None where it is another one."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        found = ctypes.CDLL(LIBRARY)
        for name in _NAMES:
            llvmlite.binding.add_symbol(name, ctypes.cast(getattr(found, name), ctypes.c_void_p).value)
        found.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        found.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return found


def compiled(function: Callable[[Any], None]) -> Any:
    """A C function of the address of a table of int64; kept on disk where there is a place for it, so that only the first call
    on a machine takes seconds."""
    library()
    options: Any = {"error_model": "numpy", "nogil": True}
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written to
        return cfunc(signature, **options)(function)


def run(function: int, arguments: Any, threads: int) -> None:
    """Call the C function at the address `function` with the address of `arguments` in each of `threads` threads."""
    gomp = library()
    assert gomp is not None
    gomp.GOMP_parallel(function, arguments, threads, 0)
