"""Collect the items that a reader of folders or tar shards finds, and make a table of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from training.data.sources.captions import clean_captions
from training.data.sources.drops import BadItem

CAPTION_COLUMNS = ("text", "captions", "caption", "prompt")
MAX_TEXT_BYTES = 1 << 20  # of one caption file or one line of metadata


class Collector:
    """Usable items as rows, the others with their reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.bad: list[BadItem] = []
        self.repairs: Counter = Counter()
        self.columns: set[str] = set()

    def drop(self, key: str, reason: str) -> None:
        """Count one unusable item."""
        self.bad.append(BadItem(key, reason))

    def add(self, key: str, captions: object, metadata: dict[str, Any], **reference: Any) -> None:
        """Add one item whose image is at `reference`; drop it if no caption is usable."""
        usable = clean_captions(captions, self.repairs)
        if not usable:
            self.drop(key, "no caption")
            return
        self.columns |= metadata.keys()
        # a table holds no lone surrogates: json escapes them as \u, a key gets ? in their place
        self.rows.append({"key": key.encode("utf-8", "replace").decode(), "captions": usable,
                          "metadata": json.dumps(metadata), **reference})

    def to_dataset(self, in_tar: bool) -> Any:
        """Return the rows as a `datasets.Dataset` in memory, which says where each image is."""
        from datasets import Dataset, Features, List, Value
        from datasets import Image as ImageFeature

        if in_tar:
            image = {"shard": Value("string"), "offset": Value("int64"), "size": Value("int64")}
        else:
            image = {"image": ImageFeature(decode=False)}
        features = Features({"key": Value("string"), "captions": List(Value("string")),
                             "metadata": Value("string"), **image})
        # with features: an empty list of rows would make columns of type null
        columns = {name: [row[name] for row in self.rows] for name in features}
        return Dataset.from_dict(columns, features=features)


def pop_captions(record: dict[str, Any], caption_column: str | None) -> object:
    """Take the captions out of a record: the named column, or the first of CAPTION_COLUMNS."""
    names = (caption_column,) if caption_column else CAPTION_COLUMNS
    for name in names:
        if name in record:
            return record.pop(name)  # popped: what is left of the record is the metadata
    return None
