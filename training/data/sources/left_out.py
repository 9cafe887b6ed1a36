"""Rows that are left out although nothing is wrong with them: failed downloads, other splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.data.sources.splits import SPLIT_WORDS, folder_split

DOWNLOADS_FAILED = "downloads failed"
OTHER_SPLITS = "rows of other splits (column split)"

SPLIT_COLUMNS = ("split",)  # in any case
STATUS_COLUMNS = ("status", "error_message")  # as img2dataset, the usual downloader, writes them
SUCCESS = {"success", "ok", "200"}


def download_failed(record: Mapping[str, Any]) -> bool:
    """Whether the record of an item without an image says that its download failed."""
    status = record.get("status")
    if status is None:
        return bool(record.get("error_message"))
    return str(status).strip().lower() not in SUCCESS


def stated_split(value: object) -> str | None:
    """Return the split that a value of a split column names: `val2017` is validation."""
    if not isinstance(value, str) or not value.strip():
        return None
    return folder_split(value.strip()) or value.strip()


def rows_of_train(values: Sequence[object]) -> list[bool] | None:
    """Whether each row belongs to the split train, by its split column; None if that names none.

    Rows with another value, such as `restval`, count as rows of another split.
    """
    splits = [stated_split(value) for value in values]
    if set(SPLIT_WORDS.values()).isdisjoint(splits):
        return None
    return [split == "train" for split in splits]
