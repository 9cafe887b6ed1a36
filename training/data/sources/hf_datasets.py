"""Import of Hugging Face `datasets` without its progress bars."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within the block, `datasets` draws no progress bars and the hub's client logs errors only; then as before."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

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
