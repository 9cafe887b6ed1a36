"""Kinds of published data sets, and the search for their annotation files."""

from __future__ import annotations

import filecmp
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from tokenloom_common.errors import UserError
from tokenloom_common.text_files import TextDecodeError, decode_text
from training.data.builders.imports.annotations import (
    AnnotatedFolder,
    Item,
    files_below,
    read_coco,
)
from training.data.builders.imports.diffusiondb import read_diffusiondb
from training.data.builders.imports.tables import parse_table, read_tables


@dataclass(frozen=True)
class ImportKind:
    """A published data set: its files, how they are read, and what is known of its licence."""

    patterns: tuple[str, ...]
    """Names of its annotation files; a folder with those of two patterns has to say which."""
    read: Callable[[AnnotatedFolder], Iterator[Item]]
    columns: dict[str, str]
    licence: str
    terms: str
    by_name: bool = True
    """Whether images are searched by the names in annotations; else the reader knows where."""


_FLICKR = ("other", "The images are under the terms of Flickr; for research and education.")
KINDS = {
    "coco": ImportKind(
        ("captions_*.json", "dataset_coco.json"), read_coco,
        {"image_id": "int64", "license": "string"}, "other",
        "Annotations: CC BY 4.0. Images: the licence of each on Flickr, in the column license."),
    "flickr30k": ImportKind(
        ("results.csv", "results*.token", "flickr_annotations_30k.csv", "dataset_flickr30k.json",
         "captions.txt"), read_tables, {}, *_FLICKR),
    "flickr8k": ImportKind(
        ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"), read_tables, {}, *_FLICKR),
    "diffusiondb": ImportKind(
        ("part-*.json", "metadata*.parquet"), read_diffusiondb,
        {"seed": "int64", "step": "int64", "cfg": "float64"}, "cc0-1.0", "CC0 1.0.",
        by_name=False),
    "table": ImportKind(
        ("captions.tsv", "captions.csv", "captions.txt"), read_tables, {}, "unknown", "Not known."),
}
"""What can be imported; `tokenloom data import --help` describes each."""


def find_annotations(kind: str, root: Path) -> list[Path]:
    """Return the annotation files of a folder. UserError if there are none, or two sorts."""
    there = _known_files(root)
    if kind not in there:
        wanted = ", ".join(KINDS[kind].patterns)
        for other, by_pattern in there.items():
            (first, *_), *_ = by_pattern.values()
            raise UserError(f"{root}: holds none of {wanted}; this looks like {other} ({first}): "
                            f"tokenloom data import {other} {shlex.quote(str(root))} --out DIR")
        packed = next(files_below(root, (".zip", ".tar", ".gz", ".tgz")), None)
        unpack = f"; unpack {packed} and the others first" if packed else ""
        raise UserError(f"{root}: holds none of {wanted}{unpack}; give the folder that holds "
                        "them, or name the files with --annotations")
    by_pattern = there[kind]
    if len(by_pattern) > 1 and kind != "diffusiondb":
        names = " and ".join(str(files[0]) for files in by_pattern.values())
        raise UserError(f"{root}: holds {names}, which may split the images differently; name one "
                        "with --annotations")
    return [path for files in by_pattern.values() for path in files]


def _known_files(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Return kind -> pattern -> the annotation files below a folder, for what there is."""
    patterns = list(dict.fromkeys(pattern for kind in KINDS.values() for pattern in kind.patterns))
    found: dict[str, list[Path]] = {}
    endings = tuple({PurePosixPath(pattern).suffix for pattern in patterns})
    for path in files_below(root, endings):
        pattern = next((known for known in patterns if fnmatch(path.name, known)), None)
        if pattern is None or not _lists_images(path):
            continue
        same_name = [other for other in found.get(pattern, []) if other.name == path.name]
        if not any(filecmp.cmp(path, other, shallow=False) for other in same_name):
            found.setdefault(pattern, []).append(path)
    return {name: {pattern: found[pattern] for pattern in kind.patterns if pattern in found}
            for name, kind in KINDS.items() if not found.keys().isdisjoint(kind.patterns)}


def _lists_images(path: Path) -> bool:
    """Whether a file of a known name begins as annotations do; JSON is believed by its name."""
    if path.suffix == ".json":
        return True
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return "image_name" in pq.read_schema(path).names
        except (pa.ArrowException, OSError):
            return True  # as below
    with path.open("rb") as file:
        start = file.readline(1 << 16)
    try:
        return parse_table(decode_text(start)) is not None
    except TextDecodeError:
        return True  # the reader says what is wrong with it
