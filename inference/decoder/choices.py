"""Choices of `calibration` on disk: by processor, versions and code, and by the shapes measured."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from inference.decoder.projection import MatmulStrategy, Storage
from tokenloom_common.kept_results import CALIBRATION_NAME, KeptResults, source_hash, versions
from tokenloom_common.processor import processor

KEPT = KeptResults(CALIBRATION_NAME)
ROWS = (1, 2, 8, 16)  # an image, a guided image, a batch, a guided batch or a Jacobi window
NATIVE_ROWS = (8, 16, 32, 64)


def strategy_key(inputs: int, outputs: int, threads: int, int8: bool) -> str:
    """Return the key of a strategy for matrices [outputs, inputs]."""
    kind = "int8" if int8 else "float32"
    return f"{_machine()}; products of {outputs} x {inputs} {kind}, {threads} threads"


def threads_key(shape: str, rows: int, most: int) -> str:
    """Return the key of the thread count of a decoder step, of which `shape` tells all sizes."""
    return f"{_machine()}; step of {shape}, {rows} rows, up to {most} threads"


@lru_cache(maxsize=1)
def _machine() -> str:
    """Return what every measurement here depends on."""
    folder = Path(__file__).parent
    code = f"{source_hash(folder)}{source_hash(folder / 'native')}"
    return f"{processor()}; {versions('torch', 'numba')} ({code})"


def keep(key: str, choice: Any, thorough: bool) -> None:
    """Keep a choice if the disk allows it. One that was measured in haste replaces no thorough one.

    thorough: measured without a limit of time.
    """
    may_replace = None if thorough else _is_hasty
    KEPT.put(key, {"choice": choice, "thorough": thorough}, may_replace)


def is_thorough(key: str) -> bool:
    """Whether a choice is kept that was measured without a limit of time."""
    return not _is_hasty(KEPT.get(key))


def kept_strategy(key: str) -> MatmulStrategy | None:
    """Return a kept strategy; None if there is none, or not one that could have been measured."""
    choice = _kept(key)
    if not isinstance(choice, list) or len(choice) != len(MatmulStrategy._fields):
        return None
    strategy = MatmulStrategy(*choice)
    possible = (strategy.storage in get_args(Storage)
                and isinstance(strategy.vector, bool)
                and strategy.flipped_from in (0, *ROWS, *NATIVE_ROWS)
                and strategy.native_to in (0, *NATIVE_ROWS))
    return strategy if possible else None


def kept_threads(key: str, most: int) -> int | None:
    """Return a kept thread count; None if there is none, or not one of 1 to `most`."""
    choice = _kept(key)
    possible = type(choice) is int and 1 <= choice <= most
    return choice if possible else None


def _is_hasty(entry: Any) -> bool:
    return not isinstance(entry, dict) or entry.get("thorough") is not True


def _kept(key: str) -> Any:
    entry = KEPT.get(key)
    return entry.get("choice") if isinstance(entry, dict) else None
