"""Captioned images as a sequence: rows of a table, each image checked and decoded on access."""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_image.images import MAX_IMAGE_PIXELS, BadImageError, open_image
from training.data.sources.captions import (
    caption_values,
    class_names,
    clean_captions,
    unusable_reason,
)
from training.data.sources.drops import DOWNLOAD_FAILED, BadItem, BadItemError
from training.data.sources.left_out import STATUS_COLUMNS, download_failed
from training.data.sources.tables.row_groups import RowGroups
from training.data.sources.tars.tar import read_member
from training.data.sources.tree import PathGuard, is_file

BAD_ITEM_ERRORS = (BadImageError, BadItemError)
"""Errors of a single item: catch them, count by `.reason`, go on."""
SCAN_ROWS = 10_000  # read at a time where every row is looked at


@dataclass(frozen=True)
class CaptionedImage:
    """One image (RGB), its captions (at least one) and its name."""

    image: Image.Image
    captions: list[str]
    key: str  # of its metadata or file name, else the row's number


@dataclass(frozen=True)
class ImageTable:
    """Rows of an opened source, one per item, and how to read them."""

    dataset: Any  # a datasets.Dataset or RowGroups
    caption_column: str
    image_column: str | None  # None: images are in tar shards, at columns shard, offset, size
    root: Path | None = None  # images given by path must lie below it; None: the paths are our own
    bad_items: list[BadItem] = field(default_factory=list)
    caption_repairs: Counter = field(default_factory=Counter)
    packed_columns: list[str] | None = None  # other columns, where `metadata` holds them as JSON
    chunk_bounds: list[int] | None = None  # first row of each shard or row group, number of rows
    encodings: Counter[str] = field(default_factory=Counter)  # caption files by encoding
    hints: list[str] = field(default_factory=list)  # what helps where items are unusable
    class_names: list[str] | None = None  # of a caption column that holds numbers of classes
    left_out: Counter = field(default_factory=Counter)  # rows with nothing wrong, by what they are


class CaptionedImages:
    """A sequence of captioned images; can be pickled for loader workers.

    `dropped` counts by reason the items found unusable when the source was opened, `bad_items`
    names them; `left_out` counts failed downloads and rows of other splits, which are no damage;
    `caption_repairs` counts the repairs of captions. `columns` are those that
    `metadata` returns. `chunk_bounds`: first row of each chunk of rows that lie together on disk,
    then the number of rows; None for data that is not read in place.
    """

    def __init__(self, path: str, table: ImageTable, max_pixels: int | None) -> None:
        self.path = path
        self.max_pixels = max_pixels or MAX_IMAGE_PIXELS
        self.dataset = table.dataset
        self.bad_items = table.bad_items
        self.left_out = table.left_out
        self.caption_repairs = table.caption_repairs
        self.chunk_bounds = table.chunk_bounds
        self.encodings = table.encodings
        self.hints = table.hints
        self.dropped = Counter(item.reason for item in table.bad_items)
        self._table = table
        # as Arrow: in its own format `datasets` would decode images, without our checks
        self._rows = table.dataset.with_format("arrow")
        self._last: tuple[int, Any] | None = None
        if table.packed_columns is not None:
            self.columns = table.packed_columns
        else:
            own = (table.image_column, table.caption_column)
            self.columns = [name for name in table.dataset.column_names if name not in own]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}  # no image bytes to loader workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> CaptionedImage:
        """Return item `index`. IndexError; one of BAD_ITEM_ERRORS if it is unusable."""
        row = self._row(index)
        key = self._key(row, index)
        # the image first: a row whose download failed is no damage, whatever its caption
        file = self._image_file(row, key)
        value = self._caption_value(row)
        captions = clean_captions(value)
        if not captions:  # sources that are read in place are not scanned when they are opened
            raise BadItemError(key, unusable_reason(value),
                               f"column {self._table.caption_column} holds none that can be used")
        image = open_image(file, key, self.max_pixels, limit_name="--data.max_pixels")
        return CaptionedImage(image, captions, key)

    def identity(self) -> str:
        """Hash what tells this data from other data of as many rows, without reading an image.

        Files count by name, size and time, rows by key and captions. Images inside a table in the
        cache of `datasets` are not looked at.
        """
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.dataset, RowGroups):
            for path in self.dataset.files:  # keys and captions are in there
                digest.update(_file_stamp(path))
        else:
            self._hash_rows(digest)
            if self._table.packed_columns is not None and self._table.image_column is not None:
                self._hash_image_files(digest, self._table.image_column)
        return digest.hexdigest()

    def _hash_rows(self, digest: Any) -> None:
        columns = self.dataset.column_names
        known = [name for name in ("key", "shard", "offset", "size") if name in columns]
        captions = self._table.caption_column
        rows = self.dataset.select_columns([*known, captions]).with_format("arrow")
        shards: set[str] = set()
        for start in range(0, len(rows), SCAN_ROWS):
            batch = rows[start:start + SCAN_ROWS]
            digest.update(repr([batch[name].to_pylist() for name in known]).encode())
            values = caption_values(batch[captions], self._table.class_names)
            digest.update(repr(values).encode())
            if "shard" in known:
                shards.update(batch["shard"].to_pylist())
        for shard in sorted(shards):  # a set of strings has another order in every process
            digest.update(_file_stamp(Path(shard)))

    def _hash_image_files(self, digest: Any, column: str) -> None:
        for index in range(len(self)):
            value = self._row(index)[column][0].as_py()
            if value["path"]:
                digest.update(_file_stamp(Path(value["path"])))
            else:
                digest.update(hashlib.sha256(value["bytes"]).digest())

    def captions(self, index: int) -> list[str]:
        """Return the captions of an item without reading its image; none of an unreadable row."""
        try:
            row = self._row(index)
        except BadItemError:
            return []
        return clean_captions(self._caption_value(row))

    def all_captions(self) -> list[str]:
        """Return every caption of every item."""
        column = self._table.caption_column
        rows = self.dataset.select_columns([column]).with_format("arrow")
        if isinstance(self.dataset, RowGroups):
            bounds = self.dataset.chunk_bounds
        else:
            bounds = [*range(0, len(rows), SCAN_ROWS), len(rows)]

        found: list[str] = []
        for start, end in pairwise(bounds):
            if start == end:
                continue
            try:
                values = caption_values(rows[start:end][column], self._table.class_names)
            except BadItemError:  # its rows are counted when they are visited
                continue
            for value in values:
                found += clean_captions(value)
        return found

    def metadata(self, index: int) -> dict[str, Any]:
        """Return the other columns of an item."""
        row = self._row(index)
        if self._table.packed_columns is not None:
            # JSON, since items of folders and tars may have different columns
            return json.loads(row["metadata"][0].as_py())
        return {name: row[name][0].as_py() for name in self.columns}

    def key(self, index: int) -> str:
        """Return the name of an item."""
        try:
            row = self._row(index)
        except BadItemError:  # not even the name can be read
            return self._row_name(index)
        return self._key(row, index)

    def _row(self, index: int) -> Any:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.path}: no item {number}, it has {len(self):,}")
        number %= len(self)
        # the last row is kept: callers ask for its image, captions and key one by one
        if self._last is None or self._last[0] != number:
            self._last = (number, self._rows[number])
        return self._last[1]

    def _caption_value(self, row: Any) -> Any:
        column, names = row[self._table.caption_column], self._table.class_names
        try:
            value = column[0].as_py()
        except UnicodeDecodeError:  # as bytes, which takes ten times as long
            return caption_values(column, names)[0]
        return class_names(value, names)

    def _key(self, row: Any, index: int) -> str:
        if "key" in row.column_names:
            value = row["key"][0].as_py()
            if isinstance(value, str) and value:
                return value
        return self._row_name(index)

    def _row_name(self, index: int) -> str:
        return f"{Path(self.path).name} row {operator.index(index) % len(self)}"

    def _image_file(self, row: Any, key: str) -> bytes | Path:
        """Return the bytes of an item's image file, or its path."""
        column = self._table.image_column
        if column is None:
            shard, offset, size = (row[name][0].as_py() for name in ("shard", "offset", "size"))
            return read_member(shard, offset, size, key)

        value = row[column][0].as_py()
        # `datasets` stores images as {bytes, path}; beside bytes, the path is a mere name
        if isinstance(value, dict):
            content = value.get("bytes")
            value = value.get("path") if content is None else content
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            facts = {name: row[name][0].as_py() for name in STATUS_COLUMNS
                     if name in row.column_names}
            reason = DOWNLOAD_FAILED if download_failed(facts) else "no picture"
            raise BadItemError(key, reason, f"column {column} holds neither bytes nor a path")

        path: Path | None = Path(value)
        if self._table.root is not None:
            # a table made by others must not name any file of this machine
            path = PathGuard(self._table.root).below(self._table.root, value)
        if path is None:
            raise BadItemError(key, "path outside the folder", value)
        if not is_file(path):
            raise BadItemError(key, "missing file", str(path))
        return path


def _file_stamp(path: Path) -> bytes:
    """Name, size and time of a file; its name alone where it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return path.name.encode()
    return repr((path.name, stat.st_size, stat.st_mtime_ns)).encode()
