"""Silence Hugging Face `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Switch off the progress bars of `datasets` and the hub client's warnings within the block."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    # both are global: leave them as the caller had them
    bars_were_on = is_progress_bar_enabled()
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    disable_progress_bar()
    hub_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub_log.setLevel(level)
        if bars_were_on:
            enable_progress_bar()
