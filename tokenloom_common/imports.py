"""Imports in the order that costs least."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress


def import_before_torch() -> None:
    """Import what must come before torch; entry points call this before they import torch.

    einx, which x-transformers and vector-quantize-pytorch import, makes its torch backend at once
    if torch is there, and that imports torch._dynamo (0.7 s on a quiet machine); otherwise at its
    first operation, and sampling has none. In another order all works the same, later.
    """
    if "torch" not in sys.modules:
        with suppress(ImportError):  # of libraries that have ceased to use it
            importlib.import_module("einx")
