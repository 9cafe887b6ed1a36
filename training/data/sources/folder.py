"""Read folders of images, listed in metadata.jsonl or metadata.csv or with same-name .txt files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.sources.collector import MAX_TEXT_BYTES, Collector, pop_captions
from training.data.sources.locate import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    path_inside,
    walk_files,
)
from training.data.sources.options import ReadOptions


def read_metadata(root: Path, options: ReadOptions) -> Collector:
    """Read metadata.jsonl or metadata.csv; a broken line costs that line only."""
    found = Collector()
    path = next(root / name for name in METADATA_NAMES if (root / name).is_file())
    read_records = _csv_records if path.suffix == ".csv" else _json_records
    for where, record in read_records(path, found):
        name = record.pop("file_name", None)
        if not isinstance(name, str) or not name:
            found.drop(where, "no file_name")
            continue
        image = path_inside(root, name)
        if image is None:
            found.drop(f"{where} ({name})", "path outside the folder")
        elif not image.is_file():
            found.drop(name, "missing file")
        else:
            captions = pop_captions(record, options.caption_column)
            found.add(name, captions, record, image=_image_reference(image))
    return found


def _image_reference(path: Path) -> dict[str, Any]:
    try:
        return {"bytes": None, "path": str(path).encode().decode()}
    except UnicodeEncodeError:
        # a table cannot hold a file name that is not UTF-8; it can hold the file itself
        return {"bytes": path.read_bytes(), "path": None}


def _json_records(path: Path, found: Collector) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        # bounded reads: a hostile file may be a single line of many gigabytes
        while line := file.readline(MAX_TEXT_BYTES):
            number += 1
            where = f"{path.name} line {number}"
            if len(line) == MAX_TEXT_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):  # pass over the rest of it
                    line = file.readline(MAX_TEXT_BYTES)
                found.drop(where, "line too long")
                continue
            if not line.strip():
                continue

            try:
                # -sig: an editor may have put a byte order mark before the first line
                record = json.loads(line.decode("utf-8-sig", errors="replace"))
            except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
                record = None
            if isinstance(record, dict):
                yield where, record
            else:
                found.drop(where, "broken metadata line")


def _csv_records(path: Path, found: Collector) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)  # newline="" above: a quoted caption may hold line ends
        while True:  # not a for loop: an error in one line must not end the iteration
            try:
                row = next(reader, None)
            except csv.Error:
                found.drop(f"{path.name} line {reader.line_num}", "broken metadata line")
                continue
            if row is None:
                return
            # a line of another length gives the name None, or the value None
            record = {name: value for name, value in row.items()
                      if isinstance(name, str) and value is not None}
            yield f"{path.name} line {reader.line_num}", record


def read_sidecars(root: Path, options: ReadOptions) -> Collector:
    """Read images with a .txt of the same name in the same folder; every line is a caption."""
    found = Collector()
    texts = {path.with_suffix(""): path for path in walk_files(root, (".txt",))}
    used = set()
    for image in walk_files(root, IMAGE_SUFFIXES):
        key = image.relative_to(root).as_posix()
        text = texts.get(image.with_suffix(""))
        if text is None:
            found.drop(key, "no caption file")
            continue
        used.add(text)  # also if the pair is dropped below: it is one bad item, not two
        _add_pair(found, root, key, image, text)

    for text in texts.values():
        if text not in used:
            found.drop(text.relative_to(root).as_posix(), "no picture for the caption file")
    return found


def _add_pair(found: Collector, root: Path, key: str, image: Path, text: Path) -> None:
    if _links_outside(root, image) or _links_outside(root, text):
        found.drop(key, "path outside the folder")
    elif not image.is_file() or not text.is_file():
        found.drop(key, "missing file")
    elif text.stat().st_size > MAX_TEXT_BYTES:
        found.drop(key, "caption file too large")
    else:
        # bytes, so that `clean_captions` sees and counts text that is not UTF-8
        lines = [line for line in text.read_bytes().splitlines() if line.strip()]
        found.add(key, lines, {}, image=_image_reference(image))


def _links_outside(root: Path, path: Path) -> bool:
    # files come from a walk of root: nothing but a link can lead outside
    return path.is_symlink() and path_inside(root, path.relative_to(root).as_posix()) is None
