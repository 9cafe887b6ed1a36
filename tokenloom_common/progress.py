"""Progress with an ETA on stderr: a live bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class _Lines:
    """stderr for a log: every redraw becomes a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[Item] | None, what: str, *, total: int | None = None, initial: int = 0,
             unit: str = "it", quiet: bool = False) -> tqdm:
    """A tqdm bar with ETA. Into a log it prints about six lines a minute instead of redrawing."""
    terminal = sys.stderr.isatty()
    return tqdm(items, desc=what, total=total, initial=initial, unit=unit, disable=quiet,
                file=sys.stderr if terminal else _Lines(),
                dynamic_ncols=terminal, ascii=not terminal,
                mininterval=0.2 if terminal else 10.0, maxinterval=1.0 if terminal else 10.0)
