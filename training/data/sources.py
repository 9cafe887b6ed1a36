"""Captioned pictures behind one door, `open_dataset`: folders, parquet, webdataset shards or a hub id, all through
Hugging Face `datasets`, each picture decoded by our own guarded reader when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_image.images import BadImageError, open_image
from tokenloom_common.errors import DataError, UserError
from training.data.captions import clean_captions
from training.data.dataset_folder import require_extra
from training.data.drops import BadItem, BadItemError, in_words
from training.data.folder_source import Collector, as_dataset, read_metadata, read_sidecars
from training.data.in_place import RowGroups, indexed_tars
from training.data.layout import Layout, below, find_layout
from training.data.table_source import hub_splits, read_hub, read_parquet, whole_files
from training.data.tar_source import read_member, read_tars

BAD_ITEM_ERRORS = (BadImageError, BadItemError)  # what asking for one item may raise: catch, count by .reason, go on
_SCAN_ROWS = 10_000


@dataclass(frozen=True)
class CaptionedImage:
    """One picture (RGB), its captions (at least one) and its name."""

    image: Image.Image
    captions: list[str]
    key: str


@dataclass(frozen=True)
class _Options:
    layout: Layout
    split: str | None
    caption_column: str | None
    image_column: str | None
    streamed_rows: int


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
        """Tells this data from other data of as many rows, without reading a picture: its files, or a thousand rows' keys
        and captions."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.dataset, RowGroups):
            for path in self.dataset.files:
                digest.update(repr((path.name, path.stat().st_size, path.stat().st_mtime_ns)).encode())
            return digest.hexdigest()
        for index in range(0, len(self), max(1, len(self) // 1000)):
            digest.update(repr((self.key(index), self.captions(index))).encode())
        return digest.hexdigest()

    def captions(self, index: int) -> list[str]:
        """The captions of an item, without touching its picture."""
        return clean_captions(_caption_value(self._row(index)[self._caption_column]))

    def all_captions(self) -> list[str]:
        """Every caption of every item."""
        rows = self.dataset.select_columns([self._caption_column]).with_format("arrow")
        return [caption for start in range(0, len(rows), _SCAN_ROWS)
                for value in _caption_values(rows[start:start + _SCAN_ROWS][self._caption_column])
                for caption in clean_captions(value)]

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


def open_dataset(path: str | Path, *, split: str | None = None, caption_column: str | None = None,
                 image_column: str | None = None, streamed_rows: int = 0) -> CaptionedImages:
    """Open captioned pictures at a local path or hub id.

    `split` None is train (or the only split). `caption_column` None is the first of text, captions, caption, prompt.
    `streamed_rows`: parquet and tar shards are read where they lie, and so many rows are kept; 0 = through a cache.
    MissingFileError for a missing path, UserError for an unknown split or column, DataError if nothing is usable.
    """
    data = load_source(path, split=split, caption_column=caption_column, image_column=image_column,
                       streamed_rows=streamed_rows)
    if not len(data):
        reasons = in_words(data.dropped) or "it is empty"
        first = f"; first: {data.bad_items[0].key}" if data.bad_items else ""
        raise DataError(f"{path}: holds no usable item ({reasons}{first})")
    return data


def list_splits(path: str | Path) -> list[str]:
    """The names of the splits at a path or hub id; a source without splits has 'train'."""
    layout = find_layout(path)
    return hub_splits(str(path)) if layout.kind == "hub" else list(layout.splits)


def load_source(path: str | Path, *, split: str | None = None, caption_column: str | None = None,
                image_column: str | None = None, streamed_rows: int = 0) -> CaptionedImages:
    """`open_dataset` that returns an empty sequence, with its reasons, where nothing is usable."""
    layout = find_layout(path)
    require_extra("datasets")
    options = _Options(layout, split, caption_column, image_column, streamed_rows)
    if not streamed_rows:
        return _KINDS[layout.kind](str(path), options)
    if layout.kind not in _IN_PLACE:
        raise UserError(f"{path}: streaming reads parquet and tar shards where they lie; this is another kind of data "
                        f"({layout.kind}), so leave data.streaming out")
    return _IN_PLACE[layout.kind](str(path), options)


def _from_metadata(path: str, options: _Options) -> CaptionedImages:
    (folder,) = options.layout.choose(options.split)
    return _in_memory(path, read_metadata(folder, options.caption_column))


def _from_sidecars(path: str, options: _Options) -> CaptionedImages:
    (folder,) = options.layout.choose(options.split)
    return _in_memory(path, read_sidecars(folder, options.caption_column))


def _from_tars(path: str, options: _Options) -> CaptionedImages:
    shards = options.layout.choose(options.split)
    return _in_memory(path, read_tars(shards, options.layout.root, options.caption_column, options.image_column),
                      in_tar=True)


def _from_indexed_tars(path: str, options: _Options) -> CaptionedImages:
    shards = options.layout.choose(options.split)
    found = indexed_tars(shards, options.layout.root, options.caption_column, options.image_column)
    return CaptionedImages(found.dataset, path=path, image_column=None, caption_column="captions", bad_items=found.bad,
                           caption_repairs=found.repairs, root=None, packed_columns=found.columns, runs=found.runs)


def _in_memory(path: str, found: Collector, in_tar: bool = False) -> CaptionedImages:
    """References and captions as a Dataset held in memory: nothing is cached, so nothing can be stale."""
    return CaptionedImages(as_dataset(found, in_tar), path=path, image_column=None if in_tar else "image",
                           caption_column="captions", bad_items=found.bad, caption_repairs=found.repairs, root=None,
                           packed_columns=sorted(found.columns))


def _from_parquet(path: str, options: _Options) -> CaptionedImages:
    files = options.layout.choose(options.split)
    table = read_parquet(files, options.layout.root, options.caption_column, options.image_column)
    return _scanned(path, table, options.layout.root)


def _from_row_groups(path: str, options: _Options) -> CaptionedImages:
    root = options.layout.root
    files, image, caption, bad = whole_files(options.layout.choose(options.split), root, options.caption_column,
                                             options.image_column)
    rows = RowGroups(files, options.streamed_rows)
    return CaptionedImages(rows, path=path, image_column=image, caption_column=caption, bad_items=bad,
                           caption_repairs=Counter(), root=root, runs=rows.runs)


def _from_hub(path: str, options: _Options) -> CaptionedImages:
    from datasets.config import HF_CACHE_HOME

    return _scanned(path, read_hub(path, options.split, options.caption_column, options.image_column),
                    Path(HF_CACHE_HOME))


def _scanned(path: str, table: Any, root: Path) -> CaptionedImages:
    """Leave out the rows without a usable caption or without any picture, counted; only these columns are read."""
    import pyarrow.compute as pc

    repairs: Counter = Counter()
    bad, good = list(table.bad), []
    rows = table.dataset.select_columns([table.image_column, table.caption_column]).with_format("arrow")
    for start in range(0, len(rows), _SCAN_ROWS):
        batch = rows[start:start + _SCAN_ROWS]
        no_picture = pc.is_null(batch[table.image_column]).to_pylist()
        for offset, captions in enumerate(_caption_values(batch[table.caption_column])):
            if no_picture[offset] or not clean_captions(captions, repairs):
                reason = "no picture" if no_picture[offset] else "no caption"
                bad.append(BadItem(f"row {start + offset}", reason))
            else:
                good.append(start + offset)
    dataset = table.dataset if len(good) == len(table.dataset) else table.dataset.select(good)
    return CaptionedImages(dataset, path=path, image_column=table.image_column, caption_column=table.caption_column,
                           bad_items=bad, caption_repairs=repairs, root=root)


def _caption_values(column: Any) -> list[Any]:
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
        return _caption_values(column)[0]


_KINDS: dict[str, Callable[[str, _Options], CaptionedImages]] = {
    "metadata": _from_metadata, "sidecar": _from_sidecars, "parquet": _from_parquet, "tar": _from_tars,
    "hub": _from_hub}
_IN_PLACE: dict[str, Callable[[str, _Options], CaptionedImages]] = {"parquet": _from_row_groups, "tar": _from_indexed_tars}
