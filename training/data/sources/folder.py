"""Captioned pictures in a folder: listed in metadata.jsonl or metadata.csv, or each with a .txt of the same name."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.sources.captions import clean_captions
from training.data.sources.drops import BadItem
from training.data.sources.locate import IMAGE_SUFFIXES, METADATA_NAMES, inside, walk_files

CAPTION_COLUMNS = ("text", "captions", "caption", "prompt")
MAX_TEXT_BYTES = 1 << 20  # of one caption file or one line of metadata


class Collector:
    """Gathers the items of a source: usable ones as rows, the others with their reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.bad: list[BadItem] = []
        self.repairs: Counter = Counter()
        self.columns: set[str] = set()

    def drop(self, key: str, reason: str) -> None:
        """Count one unusable item."""
        self.bad.append(BadItem(key, reason))

    def add(self, key: str, captions: object, metadata: dict[str, Any], **reference: Any) -> None:
        """Add one item whose picture is at `reference`; dropped if no caption is usable."""
        usable = clean_captions(captions, self.repairs)
        if not usable:
            self.drop(key, "no caption")
            return
        self.columns |= metadata.keys()
        # half an emoji (a lone surrogate) is no text that a table can hold: \u escapes in the one, ? in the other
        self.rows.append({"key": key.encode("utf-8", "replace").decode(), "captions": usable, "metadata": json.dumps(metadata),
                          **reference})


def pop_captions(values: dict[str, Any], caption_column: str | None) -> object:
    """Take the captions out of a record: the named column, or the first of CAPTION_COLUMNS that is there."""
    for name in (caption_column,) if caption_column else CAPTION_COLUMNS:
        if name in values:
            return values.pop(name)
    return None


def read_metadata(root: Path, caption_column: str | None) -> Collector:
    """Items of metadata.jsonl or metadata.csv; a broken line costs that line only."""
    found = Collector()
    path = next(root / name for name in METADATA_NAMES if (root / name).is_file())
    for where, values in _records(path, found):
        name = values.pop("file_name", None)
        if not isinstance(name, str) or not name:
            found.drop(where, "no file_name")
            continue
        picture = inside(root, name)
        if picture is None:
            found.drop(f"{where} ({name})", "path outside the folder")
        elif not picture.is_file():
            found.drop(name, "missing file")
        else:
            found.add(name, pop_captions(values, caption_column), values, image=_reference(picture))
    return found


def _reference(picture: Path) -> dict[str, Any]:
    try:
        return {"bytes": None, "path": str(picture).encode().decode()}
    except UnicodeEncodeError:  # a file name that is not UTF-8 cannot stand in a table; the picture itself can
        return {"bytes": picture.read_bytes(), "path": None}


def _records(path: Path, found: Collector) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        yield from _csv_records(path, found)
        return
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_TEXT_BYTES):
            number += 1
            where = f"{path.name} line {number}"
            if not line.endswith(b"\n") and len(line) == MAX_TEXT_BYTES:
                while line and not line.endswith(b"\n"):  # pass over the rest of it
                    line = file.readline(MAX_TEXT_BYTES)
                found.drop(where, "line too long")
                continue
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig", errors="replace"))
            except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
                values = None
            if isinstance(values, dict):
                yield where, values
            else:
                found.drop(where, "broken metadata line")


def _csv_records(path: Path, found: Collector) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        while True:
            try:
                values = next(reader, None)
            except csv.Error:
                found.drop(f"{path.name} line {reader.line_num}", "broken metadata line")
                continue
            if values is None:
                return
            yield (f"{path.name} line {reader.line_num}",
                   {name: value for name, value in values.items() if isinstance(name, str) and value is not None})


def read_sidecars(root: Path, caption_column: str | None) -> Collector:
    """Pictures with a .txt of the same name in the same folder; every line of it is a caption."""
    found = Collector()
    texts = {path.with_suffix(""): path for path in walk_files(root, (".txt",))}
    used = set()
    for picture in walk_files(root, IMAGE_SUFFIXES):
        key = picture.relative_to(root).as_posix()
        text = texts.get(picture.with_suffix(""))
        if text is None:
            found.drop(key, "no caption file")
            continue
        used.add(text)
        if any(path.is_symlink() and inside(root, path.relative_to(root).as_posix()) is None
               for path in (picture, text)):
            found.drop(key, "path outside the folder")
        elif not picture.is_file() or not text.is_file():
            found.drop(key, "missing file")
        elif text.stat().st_size > MAX_TEXT_BYTES:
            found.drop(key, "caption file too large")
        else:
            lines: list[object] = [line for line in text.read_bytes().splitlines() if line.strip()]
            found.add(key, lines, {}, image=_reference(picture))
    for text in texts.values():
        if text not in used:
            found.drop(text.relative_to(root).as_posix(), "no picture for the caption file")
    return found


def as_dataset(found: Collector, in_tar: bool) -> Any:
    """What a reader of folders or tar shards found, as a Dataset in memory that says where each picture is."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    picture = ({"shard": Value("string"), "offset": Value("int64"), "size": Value("int64")} if in_tar
               else {"image": ImageFeature(decode=False)})
    features = Features({"key": Value("string"), "captions": List(Value("string")), "metadata": Value("string"),
                         **picture})
    return Dataset.from_dict({name: [row[name] for row in found.rows] for name in features}, features=features)
