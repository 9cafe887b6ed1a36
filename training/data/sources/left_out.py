"""Rows that are left out although nothing is wrong with them: failed downloads, other splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.data.sources.splits import folder_split

DOWNLOADS_FAILED = "downloads failed"
OTHER_SPLITS = "rows of other splits (column split)"

SPLIT_COLUMN = "split"
STATUS_COLUMNS = ("status", "error_message")  # as img2dataset, the usual downloader, writes them
SUCCESS = {"success", "ok", "200"}


def download_failed(record: Mapping[str, Any]) -> bool:
    """Whether the record of an item without an image says that its download failed."""
    status = record.get("status")
    if status is None:
        return bool(record.get("error_message"))
    return str(status).strip().lower() not in SUCCESS


def rows_of_train(values: Sequence[object]) -> list[bool] | None:
    """Whether each row belongs to the split train, by its split column; None if that names none.

    Rows with another value, such as `restval`, count as rows of another split.
    """
    splits = {value: folder_split(value) for value in set(values) if isinstance(value, str)}
    if not any(splits.values()):
        return None
    return [isinstance(value, str) and splits[value] == "train" for value in values]
