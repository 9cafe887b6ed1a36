"""Content of hostile files for tests."""

from __future__ import annotations

from collections.abc import Callable


class Runs:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call
