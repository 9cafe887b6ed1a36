"""Models on torch's meta device, where tensors have shapes and no numbers: what a model takes is counted before it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError


def build_on_meta(kind: Callable[[Any], Any], config: StrictConfig) -> Any:
    """The model of a config on the meta device. UserError for one that no machine could hold."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"no model can be built from this config ({' '.join(str(error).split())[:120]})") from None


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Let code that turns autocast off for its tensor's device run on the meta device, which torch.autocast does not know."""
    original = torch.autocast.__init__

    def start(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]
