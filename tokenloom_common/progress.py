"""Progress with an ETA on stderr: a live bar on a terminal, a few lines a minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _LineWriter:
    """stderr for a log: every redraw of the bar becomes a line of its own."""

    def write(self, text: str) -> None:
        # tqdm begins each redraw with \r, which a log would join to one endless line
        line = text.strip("\r\n")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[Item] | None, what: str, *, total: int | None = None, initial: int = 0,
             unit: str = "it", quiet: bool = False) -> tqdm:
    """A tqdm bar with ETA. Into a log it prints about six lines a minute instead of redrawing."""
    # intervals between redraws in seconds
    if sys.stderr.isatty():
        display: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True,
                                   "ascii": None,  # blocks where the terminal's encoding has them
                                   "mininterval": 0.2, "maxinterval": 1.0}
    else:
        display = {"file": _LineWriter(), "dynamic_ncols": False, "ascii": True,
                   "mininterval": 10.0, "maxinterval": 10.0}
    return tqdm(items, desc=what, total=total, initial=initial, unit=unit, disable=quiet, **display)
