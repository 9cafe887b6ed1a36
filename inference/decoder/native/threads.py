"""Compiled steps on PyTorch's own threads: one parallel OpenMP region with barriers inside.

A second thread pool would compete with PyTorch's for the cores, because OpenMP's threads spin while
they wait. So a step runs on the existing pool; a step of a hundred parts costs one start and a
hundred barriers (a microsecond each).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llvmlite.binding
import torch
from numba import cfunc, types
from numba.core import event

log = logging.getLogger(__name__)

LIBRARY = "libgomp.so.1"  # by this name the loader returns the copy that PyTorch has already loaded
_NAMES = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")

thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
barrier = types.ExternalFunction("GOMP_barrier", types.void())
"""Wait until every thread of the parallel region has come here."""


@lru_cache(maxsize=1)
def library() -> Any | None:
    """Load PyTorch's OpenMP library and show it to the compiler; None if it is another one."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        found = ctypes.CDLL(LIBRARY)
        for name in _NAMES:
            address = ctypes.cast(getattr(found, name), ctypes.c_void_p).value
            llvmlite.binding.add_symbol(name, address)
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        found.GOMP_parallel.argtypes = (pointer, pointer, unsigned, unsigned)
        found.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return found


def compiled(function: Callable[[Any], None], note: str = "") -> Any:
    """Compile a function of one int64 table into a C function of its address.

    The machine code is cached on disk if possible, so that only the first call on a machine takes
    seconds. note: a warning to log if they are taken.
    """
    library()
    options: Any = {"error_model": "numpy", "nogil": True}
    signature = types.void(types.CPointer(types.int64))
    with event.install_listener("numba:compile", _Announcement(note)):
        try:
            return cfunc(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache can be written to
            if note:
                log.warning("compiled code cannot be kept, and is compiled at each start; set "
                            "NUMBA_CACHE_DIR to a folder that can be written to")
            return cfunc(signature, **options)(function)


class _Announcement(event.Listener):
    """Logs a note when Numba begins to compile, and not when it reads its cache."""

    def __init__(self, note: str) -> None:
        self._note = note

    def on_start(self, event: Any) -> None:
        """Log the note, once."""
        if self._note:
            log.warning(self._note)
            self._note = ""

    def on_end(self, event: Any) -> None:
        """Do nothing."""


def run(function: int, arguments: Any, threads: int) -> None:
    """Call a C function, given by its address, with `arguments` in each of `threads` threads."""
    gomp = library()
    assert gomp is not None
    gomp.GOMP_parallel(function, arguments, threads, 0)
