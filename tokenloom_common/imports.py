"""Imports of torch and what stands on it, in the way that costs least."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def import_before_torch() -> None:
    """Import what must come before torch; entry points call this before they import torch.

    einx, which x-transformers and vector-quantize-pytorch import, makes its torch backend at once
    if torch is there, and that imports torch._dynamo (0.7 s on a quiet machine); otherwise at its
    first operation, and sampling has none. In another order all works the same, later.
    """
    if "torch" not in sys.modules:
        with suppress(ImportError):  # of libraries that have ceased to use it
            importlib.import_module("einx")


@contextmanager
def importing_torch() -> Iterator[None]:
    """Import torch and its like inside the block, without the garbage collector.

    400,000 objects come with them, none of which is ever garbage. Looked through again and again
    while they are made, and once more when the process ends, they cost a second of processor time.
    Commands alone use this: it sets aside all objects that are there. Does nothing after torch.
    """
    if "torch" in sys.modules:
        yield
        return

    was_on = gc.isenabled()
    gc.disable()
    try:
        import_before_torch()
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
