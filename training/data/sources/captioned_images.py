"""Captioned pictures as a sequence: rows of a table, each picture decoded by our own guarded reader when it is asked for."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_image.images import BadImageError, open_image
from training.data.sources.captions import clean_captions
from training.data.sources.drops import BadItem, BadItemError
from training.data.sources.in_place import RowGroups
from training.data.sources.locate import below
from training.data.sources.tar import read_member

BAD_ITEM_ERRORS = (BadImageError, BadItemError)  # what asking for one item may raise: catch, count by .reason, go on
SCAN_ROWS = 10_000


@dataclass(frozen=True)
class CaptionedImage:
    """One picture (RGB), its captions (at least one) and its name."""

    image: Image.Image
    captions: list[str]
    key: str


class CaptionedImages:
    """A sequence of captioned pictures over a `datasets.Dataset`; can be pickled for loader workers.

    `dropped` counts by reason what was unusable when it was opened and `bad_items` names each; `caption_repairs`
    counts what had to be done to captions. `dataset` has one row an item; `columns` are those `metadata` returns. `runs`: where
    rows that lie together begin, of shards that are read in place.
    """

    def __init__(self, dataset: Any, *, path: str, image_column: str | None, caption_column: str,
                 bad_items: list[BadItem], caption_repairs: Counter, root: Path | None,
                 packed_columns: list[str] | None = None, runs: list[int] | None = None) -> None:
        self.dataset = dataset
        self.runs = runs
        self.path = path
        self.bad_items = bad_items
        self.caption_repairs = caption_repairs
        self.dropped = Counter(item.reason for item in bad_items)
        self._rows = dataset.with_format("arrow")
        self._last: tuple[int, Any] | None = None
        self._image_column = image_column  # None: in a tar shard
        self._caption_column = caption_column
        self._root = root  # pictures given by path must lie below it; None: the paths are our own
        self._packed = packed_columns is not None
        own = (image_column, caption_column)
        self.columns = packed_columns if packed_columns is not None else [
            name for name in dataset.column_names if name not in own]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> CaptionedImage:
        """Item `index` (negative from the end). IndexError; one of BAD_ITEM_ERRORS if its picture is unusable."""
        row = self._row(index)
        key = self._key(row, index)
        captions = clean_captions(_caption_value(row[self._caption_column]))
        if not captions:  # of shards that are read in place, whose captions nobody looked at before
            raise BadItemError(key, "no caption", f"column {self._caption_column} holds none that can be used")
        return CaptionedImage(open_image(self._picture(row, key), name=key), captions, key)

    def identity(self) -> str:
        """Tells this data from other data of as many rows, without reading a picture: files by size and time, and every key and
        caption. Pictures in a table of the cache of `datasets` are not looked at."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.dataset, RowGroups):
            for path in self.dataset.files:
                digest.update(_stamp(path))
            return digest.hexdigest()
        known = [name for name in ("key", "shard", "offset", "size") if name in self.dataset.column_names]
        rows = self.dataset.select_columns([*known, self._caption_column]).with_format("arrow")
        shards: set[str] = set()
        for start in range(0, len(rows), SCAN_ROWS):
            batch = rows[start:start + SCAN_ROWS]
            digest.update(repr([batch[name].to_pylist() for name in known]).encode())
            digest.update(repr(caption_values(batch[self._caption_column])).encode())
            shards.update(batch["shard"].to_pylist() if "shard" in known else ())
        for shard in sorted(shards):
            digest.update(_stamp(Path(shard)))
        if self._packed and self._image_column is not None:
            for index in range(len(self)):  # pictures in a folder
                value = self._row(index)[self._image_column][0].as_py()
                digest.update(_stamp(Path(value["path"])) if value["path"] else hashlib.sha256(value["bytes"]).digest())
        return digest.hexdigest()

    def captions(self, index: int) -> list[str]:
        """The captions of an item, without touching its picture; none of a row of a stream that cannot be read."""
        try:
            return clean_captions(_caption_value(self._row(index)[self._caption_column]))
        except BadItemError:
            return []

    def all_captions(self) -> list[str]:
        """Every caption of every item."""
        rows = self.dataset.select_columns([self._caption_column]).with_format("arrow")
        bounds = self.runs if isinstance(self.dataset, RowGroups) else [*range(0, len(rows), SCAN_ROWS), len(rows)]
        found: list[str] = []
        for start, end in pairwise(bounds or []):
            try:
                values = caption_values(rows[start:end][self._caption_column]) if end > start else []
            except BadItemError:  # its rows are counted when their turn comes
                continue
            found += [caption for value in values for caption in clean_captions(value)]
        return found

    def metadata(self, index: int) -> dict[str, Any]:
        """The other columns of an item."""
        row = self._row(index)
        if self._packed:
            return json.loads(row["metadata"][0].as_py())
        return {name: row[name][0].as_py() for name in self.columns}

    def key(self, index: int) -> str:
        """The name of an item."""
        try:
            return self._key(self._row(index), index)
        except BadItemError:  # not even that can be read
            return f"{Path(self.path).name} row {index}"

    def _row(self, index: int) -> Any:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path}: no item {number}, it has {len(self):,}")
        number %= len(self)
        if self._last is None or self._last[0] != number:  # picture, captions and key of a row are asked for one by one
            self._last = number, self._rows[number]
        return self._last[1]

    def _key(self, row: Any, index: int) -> str:
        if "key" in row.column_names:
            value = row["key"][0].as_py()
            if isinstance(value, str) and value:
                return value
        return f"{Path(self.path).name} row {operator.index(index) % len(self)}"

    def _picture(self, row: Any, key: str) -> bytes | Path:
        if self._image_column is None:
            return read_member(row["shard"][0].as_py(), row["offset"][0].as_py(), row["size"][0].as_py(), key)
        value = row[self._image_column][0].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise BadItemError(key, "no picture", f"column {self._image_column} holds neither bytes nor a path")
        picture: Path | None = Path(value)
        if self._root is not None:  # a table made by others must not name any file of this machine
            picture = below(self._root, value)
        if picture is None:
            raise BadItemError(key, "path outside the folder", value)
        if not picture.is_file():
            raise BadItemError(key, "missing file", str(picture))
        return picture


def _stamp(path: Path) -> bytes:
    """A file's name, size and time; its name alone where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return path.name.encode()
    return repr((path.name, stat.st_size, stat.st_mtime_ns)).encode()


def caption_values(column: Any) -> list[Any]:
    """A column of captions as Python values, text as bytes: Arrow does not promise that its text is valid UTF-8."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    elif (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (
            pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
        column = column.cast(pa.large_list(pa.large_binary()))
    return column.to_pylist()


def _caption_value(column: Any) -> Any:
    try:
        return column[0].as_py()
    except UnicodeDecodeError:
        return caption_values(column)[0]
