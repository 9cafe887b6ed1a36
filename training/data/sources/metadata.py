"""Lists of images with their captions: metadata.jsonl, .csv, .tsv, .parquet, or of another name."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TextIO

from tokenloom_common.errors import DataError, UserError
from tokenloom_common.extras import require_extra
from tokenloom_common.text_files import TextDecodeError, decode_text, text_codec
from training.data.sources.collector import (
    IMAGE_COLUMNS,
    MAX_TEXT_BYTES,
    Collector,
    find_name,
    pick_captions,
)
from training.data.sources.options import ReadOptions
from training.data.sources.splits import SPLIT_WORDS, SplitFolders, file_split, held_out
from training.data.sources.tree import FileTree, PathGuard

NAME_COLUMNS = ("file_name", "filename", "image_file_name", "image_name", "image", "img",
                "image_path", "img_path", "image_file", "file_path", "filepath", "file", "path",
                "picture")
"""Usual columns with the names of images; `datasets` calls it file_name."""
SPLIT_COLUMN = "split"
DELIMITERS = ",;\t|"
BYTE_ORDER_MARK = "\ufeff"
FIRST_RECORDS = 20  # of a .jsonl file, whose union of keys are its columns

_HEAD_BYTES = 1 << 16
# the marks of bytes that could not be decoded
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_REPLACED = "\ufffd"


class Row(NamedTuple):
    """A row that names an image which is there."""

    where: str  # the line, for messages
    key: str
    image: Path
    record: dict[str, Any]  # without the name


class ImageList:
    """One list of images, and the folder whose images it names."""

    def __init__(self, path: Path, tree: FileTree, options: ReadOptions) -> None:
        self.path = path
        self.tree = tree
        self.options = options
        self.folders = SplitFolders(tree.relative(image).parent for image in tree.images)
        self.guard = PathGuard(tree.root, options.follow_links)

    @cached_property
    def columns(self) -> list[str]:
        """Names of its columns; none if it cannot be read."""
        if self.path.suffix == ".parquet":
            return _parquet_columns(self.path)
        names: dict[str, None] = {}  # in order
        lines = _read_lines(self.path, self.options.encoding)
        for line in itertools.islice(lines, FIRST_RECORDS):
            names |= dict.fromkeys(line.record or {})
        return list(names)

    @cached_property
    def name_column(self) -> str | None:
        """Column with the names of the images, if one is known."""
        return find_name(self.columns, self.options.image_column, NAME_COLUMNS)

    @property
    def has_captions(self) -> bool:
        """Whether a column with captions is known."""
        return pick_captions(dict.fromkeys(self.columns, "x"), self.options) is not None

    def own_split(self) -> str | None:
        """Return the split that the list's folder or name says, if any."""
        relative = self.tree.relative(self.path)
        by_folder = self.folders.split(relative.parent)
        by_name = file_split(relative.stem)
        if by_folder is None and by_name is None:
            return None
        return held_out((by_folder, by_name))

    def splits(self) -> list[str]:
        """Return the splits that its rows belong to."""
        own = self.own_split()
        # where nothing else can say, the rows need not be looked at
        in_folders = any(self.folders.split(self.tree.relative(image).parent)
                         for image in self.tree.images)
        if SPLIT_COLUMN not in self.columns and not in_folders:
            return [own or "train"]
        records = self._records(Collector())
        found = dict.fromkeys(self._row_split(record, own) for _, record in records)
        return list(found) or [own or "train"]

    def rows(self, split: str, found: Collector) -> Iterator[Row]:
        """Yield the rows of a split that name an image; count the others.

        UserError listing the columns if none is known to name images.
        """
        if self.name_column is None:
            listed = ", ".join(self.columns) or "none"
            raise UserError(f"{self.path}: no column with the names of the images (file_name or "
                            f"image); columns: {listed}; name it with --data.image_column")
        own = self.own_split()
        for where, record in self._records(found):
            if self._row_split(record, own) != split:
                continue
            name = record.pop(self.name_column, None)
            if not isinstance(name, str) or not name:
                found.drop(where, f"no {self.name_column}")
                continue
            image = self._image(name)
            if image is None:
                found.drop(f"{where} ({name})", "path outside the folder")
            elif not image.is_file():
                found.drop(self._key(name), "missing file")
                found.hint(f"looked for {image}")
            else:
                yield Row(where, self._key(name), image, record)

    def _records(self, found: Collector) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.path.suffix == ".parquet":
            return _parquet_records(self.path)
        return _read_records(self.path, found, self.options.encoding)

    def _row_split(self, record: dict[str, Any], own: str | None) -> str:
        """Return the split of a row: what its column, its image's folder or the list holds out."""
        stated = record.get(SPLIT_COLUMN)
        if isinstance(stated, str) and stated:
            stated = SPLIT_WORDS.get(stated.strip().lower(), stated.strip())
        else:
            stated = None
        name = record.get(self.name_column or "")
        by_folder = None
        if isinstance(name, str) and name:
            image = self._image(name)
            if image is not None and image.is_relative_to(self.tree.root):
                by_folder = self.folders.split(self.tree.relative(image).parent)
        return held_out((stated, by_folder, own))

    def _key(self, name: str) -> str:
        """Return the name of an image below the root of the data."""
        folder = self.tree.relative(self.path).parent
        return name if folder == PurePosixPath(".") else f"{folder}/{name}"

    def _image(self, name: str) -> Path | None:
        """Return the path of a named image, which may be missing; None if it is not allowed."""
        folder = self.path.parent
        path = self.guard.inside(folder, name)
        if path is None or path.is_file():
            return path
        # written on Windows; or as seen from the root of the data; or without its folder
        for other in (folder / name.replace("\\", "/"),
                      self.tree.root / name.replace("\\", "/")):
            if other.is_file():
                return other if self.guard.allows(other) else None
        return self._by_base_name.get(name, path)

    @cached_property
    def _by_base_name(self) -> dict[str, Path]:
        """Images below the list's folder by their base names, which must be unique."""
        found: dict[str, Path] = {}
        twice = set()
        for image in self.tree.images:
            if image.is_relative_to(self.path.parent):
                if image.name in found:
                    twice.add(image.name)
                found[image.name] = image
        return {name: path for name, path in found.items() if name not in twice}


def _parquet_columns(path: Path) -> list[str]:
    require_extra("datasets", "reading parquet files")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return []


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    for number, record in enumerate(pq.read_table(path).to_pylist()):
        yield f"{path.name} row {number}", record


class _Line(NamedTuple):
    """A line of a list: its record, or the reason that it has none."""

    number: int
    record: dict[str, Any] | None
    reason: str = "broken metadata line"


def _read_records(path: Path, found: Collector, encoding: str | None
                  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where a line stands and its record; a broken line costs that line only."""
    codec = _list_codec(path, encoding)
    found.encodings[codec.upper()] += 1
    for line in _read_lines(path, encoding):
        where = f"{path.name} line {line.number}"
        if line.record is None:
            found.drop(where, line.reason)
        elif _is_undecoded(line.record, codec):
            found.drop(where, f"line not {codec.upper()}")
            found.hint(f"{path.name} is not {codec.upper()}: save it as UTF-8, or say what it is "
                       "with --data.encoding (Windows' of Western Europe is cp1252)")
        else:
            yield where, line.record


def _read_lines(path: Path, encoding: str | None) -> Iterator[_Line]:
    codec = _list_codec(path, encoding)
    # UTF-8 marks its undecodable bytes, so that they can be told from a U+FFFD of the text
    errors = "surrogateescape" if codec == "utf-8" else "replace"
    with path.open(encoding=codec, errors=errors, newline="") as file:
        if codec == "utf-8" and file.read(1) != BYTE_ORDER_MARK:
            file.seek(0)
        # newline="" above: a quoted caption of a .csv file may hold line ends
        yield from _json_lines(file) if path.suffix.lower() == ".jsonl" else _csv_lines(file)


def _list_codec(path: Path, encoding: str | None) -> str:
    """Return the codec of a list. DataError for UTF-16 without a byte order mark and the like."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    try:
        decode_text(head, encoding)
    except TextDecodeError as error:
        # single lines of other encodings are counted one by one, and the head may cut a letter
        if error.line is None:
            raise DataError(f"{path}: {error}; save it as UTF-8, or say what it is with "
                            "--data.encoding") from None
    return text_codec(head, encoding)


def _is_undecoded(record: dict[str, Any], codec: str) -> bool:
    texts = [value for value in record.values() if isinstance(value, str)]
    if codec == "utf-8":
        return any(_NOT_UTF8.search(text) for text in texts)
    return any(_REPLACED in text for text in texts)


def _json_lines(file: TextIO) -> Iterator[_Line]:
    number = 0
    # bounded reads: a hostile file may be a single line of many gigabytes
    while line := file.readline(MAX_TEXT_BYTES):
        number += 1
        if len(line) == MAX_TEXT_BYTES and not line.endswith("\n"):
            while line and not line.endswith("\n"):  # pass over the rest of it
                line = file.readline(MAX_TEXT_BYTES)
            yield _Line(number, None, "line too long")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            record = None
        yield _Line(number, record if isinstance(record, dict) else None)


def _csv_lines(file: TextIO) -> Iterator[_Line]:
    head = file.readline(MAX_TEXT_BYTES)
    delimiter = max(DELIMITERS, key=head.count)  # of equally frequent ones the first
    names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
    reader = csv.DictReader(file, names, delimiter=delimiter)
    while True:  # not a for loop: an error in one line must not end the iteration
        try:
            row = next(reader, None)
        except csv.Error:
            yield _Line(reader.line_num + 1, None)
            continue
        if row is None:
            return
        # a line of another length gives the name None, or the value None
        record = {name: value.strip() for name, value in row.items()
                  if isinstance(name, str) and isinstance(value, str)}
        yield _Line(reader.line_num + 1, record)


def is_list_of_images(path: Path, tree: FileTree, options: ReadOptions) -> bool:
    """Whether a file has columns that name images and hold captions."""
    if not tree.images:
        return False
    images = ImageList(path, tree, options)
    return images.name_column is not None and images.has_captions


def image_tables(paths: Sequence[Path], options: ReadOptions) -> list[Path]:
    """Return the parquet files with images in them, and those that cannot be read beside such."""
    columns = {path: _parquet_columns(path) for path in paths}
    with_images = [path for path in paths
                   if find_name(columns[path], options.image_column, IMAGE_COLUMNS)]
    return [path for path in paths if path in with_images or (with_images and not columns[path])]
