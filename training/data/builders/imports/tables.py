"""Tables of images and captions: Flickr8k, Flickr30k, and others of their form."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tokenloom_common.errors import DataError
from tokenloom_common.text_files import text_lines
from training.data.builders.imports.annotations import (
    AnnotatedFolder,
    Item,
    files_below,
    read_coco,
)
from training.data.sources.splits import SPLIT_WORDS
from training.data.sources.tree import IMAGE_SUFFIXES

TABLE_IMAGE = ("image_name", "image", "filename", "file_name", "filepath", "file")
TABLE_CAPTION = ("comment", "caption", "captions", "raw", "text")


def read_tables(folder: AnnotatedFolder) -> Iterator[Item]:
    """Yield the images of tables; the splits are a column, or lists such as Flickr8k's."""
    if any(path.suffix == ".json" for path in folder.files):
        yield from read_coco(folder)
        return
    captions: dict[str, list[object]] = {}
    splits: dict[str, str] = {}
    for path in folder.files:
        for name, values, split in _table_rows(path, folder):
            captions.setdefault(name, []).extend(values)
            if splits.setdefault(name, split) != split:
                raise DataError(f"{path}: {name} is in the splits {splits[name]} and {split}")

    listed = {} if any(splits.values()) else _listed_splits(folder)
    # lists of other things, if they name none of these images
    has_lists = any(PurePosixPath(name).stem in listed for name in captions)
    for name, values in captions.items():
        split = splits[name] or listed.get(PurePosixPath(name).stem, "")
        if has_lists and not split:
            folder.problems["image in no list of a split"] += 1
        else:
            yield Item(name, values, SPLIT_WORDS.get(split.lower(), split or "train"), {})


class Table(NamedTuple):
    """Rows of a table of images; which of their cells are the image, the captions and the split."""

    rows: Iterator[list[str]]
    image: int
    caption: int
    split: int | None = None


def parse_table(text: str) -> Table | None:
    """Find the separator of a table by its first line; None if that names no images."""
    lines = [line for line in text_lines(text) if line.strip()]
    first = lines[0] if lines else ""
    for separator in "\t|;,":
        names = [cell.strip(' "').lower() for cell in first.split(separator)]
        rows: Iterator[list[str]]
        if separator in ";,":  # quoted, and quoted captions may hold line ends
            rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)
        else:
            rows = (line.split(separator, len(names) - 1) for line in lines)

        image = _first_known(names, TABLE_IMAGE)
        caption = _first_known(names, TABLE_CAPTION)
        if image is not None and caption is not None:
            next(rows)  # the head
            return Table(rows, image, caption, _first_known(names, ("split",)))
        # no head: an image, perhaps a number, and a caption
        if len(names) > 1 and names[0].partition("#")[0].endswith(IMAGE_SUFFIXES):
            return Table(rows, 0, len(names) - 1)
    return None


def _first_known(names: list[str], known: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)


def _table_rows(path: Path, folder: AnnotatedFolder) -> Iterator[tuple[str, list[object], str]]:
    """Yield the image, captions and split ("" for none) of each row."""
    table = parse_table(folder.text(path))
    if table is None:
        raise DataError(f"{path}: its first line names no columns of images and captions, such as "
                        "image,caption")
    try:
        for row in table.rows:
            cells = [cell.strip() for cell in row]
            # Flickr30k's results.csv has a line without a bar between number and caption
            joined = re.fullmatch(r"(\d)\s+(.+)", cells[-1]) if len(cells) == 2 else None
            if joined and table.caption == 2:
                cells[1:] = joined.groups()
            if len(cells) <= max(table.image, table.caption, table.split or 0):
                folder.problems["broken line"] += 1
                continue
            name = re.sub(r"#\d+$", "", cells[table.image])  # 1000092795.jpg#0
            split = "" if table.split is None else cells[table.split]
            yield name, _caption_list(cells[table.caption]), split
    except csv.Error as error:  # a quote that nothing closes makes one cell of the rest
        raise DataError(f"{path}: not a table that can be read ({error})") from None


def _caption_list(cell: str) -> list[object]:
    """Return the captions in a cell: one, or a JSON list of them."""
    try:
        values = json.loads(cell) if cell.startswith('["') else None
    except ValueError:
        values = None
    return values if isinstance(values, list) else [cell]


def _listed_splits(folder: AnnotatedFolder) -> dict[str, str]:
    """Return the split of each image, by its name without ending, from lists of names."""
    listed = {}
    for path in files_below(folder.root, (".txt",)):
        # Flickr_8k.devImages.txt, test.txt
        match = re.fullmatch(r"(?:flickr_?\d+k[-._])?(train|dev|val|test)(?:images)?", path.stem,
                             re.IGNORECASE)
        if match:
            for line in text_lines(folder.text(path)):
                listed[PurePosixPath(line.strip()).stem] = SPLIT_WORDS[match[1].lower()]
    return listed
