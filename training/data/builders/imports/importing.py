"""Import published data sets: bring their images and captions into parquet shards, bytes unchanged.

    OUT/data/train-00000-of-00038.parquet   image, captions, key, and what else the source says
    OUT/README.md, OUT/build.json           data card; arguments and counts of the build
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, MissingFileError, UserError, choose
from tokenloom_common.extras import require_extra
from tokenloom_common.files import atomic_folder
from tokenloom_common.outputs import check_output_folder
from tokenloom_common.progress import progress
from training.data.builders.dataset_folder import (
    OWN_NAMES,
    ShardWriter,
    card_head,
    previous_build,
    write_record,
)
from training.data.builders.imports.annotations import AnnotatedFolder, Item
from training.data.builders.imports.image_files import ImageFiles
from training.data.builders.imports.kinds import KINDS, ImportKind, find_annotations
from training.data.sources.captions import clean_captions

NAMED_MISSING = 3
MAX_IMAGE_BYTES = 1 << 30  # an Arrow column of bytes ends at twice that


@dataclass
class Tally:
    """Counts of an import: images and bytes to copy, what is left out and why."""

    problems: Counter
    images: Counter = field(default_factory=Counter)  # by split
    bytes: int = 0
    missing: list[str] = field(default_factory=list)


def import_data(kind: str, source: str | Path, out: str | Path, *,
                annotations: Sequence[str | Path] = (), images: str | Path | None = None,
                encoding: str | None = None, follow_links: bool = False) -> dict[str, Any]:
    """Copy a published data set into parquet shards at `out`; return build.json, and `reused`.

    kind: a key of KINDS. source: the folder that it was unpacked to. annotations: its annotation
    files; found by name if there are none. images: the folder of the images; `source` if None.
    encoding: of annotations that are neither UTF-8 nor begin with a byte order mark.
    follow_links: take images that links lead to out of the folder.

    UserError for arguments that cannot be, DataError if annotations cannot be read or none of the
    images that they name is there: all before anything is written.
    """
    known = choose(KINDS, kind, "kind of data")
    require_extra("datasets", "importing a dataset")
    out = check_output_folder("--out", out, tuple(OWN_NAMES))
    root = Path(source)
    image_root = Path(images or root)
    files = _annotation_files(kind, root, image_root, [Path(path) for path in annotations])
    folder = AnnotatedFolder(root, image_root, files, encoding, follow_links)

    started = time.monotonic()
    index = ImageFiles(folder) if known.by_name else None
    tally = Tally(folder.problems)
    content = hashlib.blake2b(digest_size=16)
    found = _usable(known, folder, index, tally)
    for item, path, captions in progress(found, "looking for images", unit="image"):
        facts = (item.name, item.split, item.columns, captions, path.stat().st_mtime_ns)
        content.update(repr(facts).encode("utf-8", "replace"))
    if not tally.images:
        raise DataError(_nothing_found(folder, tally, [] if index is None else index.links))
    if index is not None:
        tally.problems["image without a caption"] += len(index) - len(index.split_of)

    arguments = {"source": str(folder.root.resolve()), "bytes": tally.bytes,
                 "content": content.hexdigest()}
    earlier = previous_build(out, f"import {kind}", arguments, tally.bytes)
    if earlier is not None:
        return {**earlier, "reused": True}
    return {**_write(out, kind, folder, index, tally, arguments, started), "reused": False}


# ---- what is there ----

def _annotation_files(kind: str, root: Path, images: Path, given: list[Path]) -> list[Path]:
    for folder in (root, images):
        if not folder.exists():
            raise MissingFileError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file; unpack it, and give the folder")
    for path in given:
        if not path.is_file():
            raise MissingFileError(f"--annotations {path}: no such file")
    return given or find_annotations(kind, root)


def _usable(kind: ImportKind, folder: AnnotatedFolder, index: ImageFiles | None, tally: Tally
            ) -> Iterator[tuple[Item, Path, list[str]]]:
    """Yield each item that can be imported, the file of its image and its captions."""
    for listed in kind.read(folder):
        # a split is a part of a file's name
        item = listed._replace(split=re.sub(r"\W+", "_", listed.split))
        path = item.path if index is None else index.find(item.name, item.split)
        captions = clean_captions(item.captions)
        if path is None or not path.is_file():
            tally.missing.append(item.name)
        elif not captions:
            tally.problems["no caption"] += 1
        elif not 0 < path.stat().st_size <= MAX_IMAGE_BYTES:
            tally.problems["empty or huge file"] += 1
        else:
            tally.images[item.split] += 1
            tally.bytes += path.stat().st_size
            yield item, path, captions


def _nothing_found(folder: AnnotatedFolder, tally: Tally, links: list[Path]) -> str:
    files = ", ".join(path.name for path in folder.files[:3])
    if not tally.missing:
        problems = ", ".join(f"{count:,} {reason}" for reason, count in tally.problems.items())
        return f"{folder.root}: {files}: no image with a caption ({problems or 'nothing listed'})"
    linked = f"; {links[0]} is a link, which --follow-links follows" if links else ""
    return (f"{folder.root}: none of the {len(tally.missing):,} images that {files} names is there "
            f"(such as {tally.missing[0]}, looked for below {folder.images}); unpack them there, "
            f"or name their folder with --images{linked}")


# ---- files ----

def _write(out: Path, name: str, folder: AnnotatedFolder, index: ImageFiles | None, tally: Tally,
           arguments: dict[str, Any], started: float) -> dict[str, Any]:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    kind = KINDS[name]
    columns = {column: Value(dtype) for column, dtype in kind.columns.items()}
    features = Features({"image": ImageFeature(), "captions": List(Value("string")), **columns,
                         "key": Value("string")})
    again = replace(folder, problems=Counter())  # the first pass counted them
    total = tally.images.total()
    with atomic_folder(out, tuple(OWN_NAMES)) as aside:
        writers = {split: ShardWriter(aside, split, features) for split in tally.images}
        rows = _usable(kind, again, index, Tally(again.problems))
        for item, path, captions in progress(rows, "importing", total=total, unit="image"):
            try:
                content = path.read_bytes()
            except OSError:
                tally.problems["image that cannot be read"] += 1
                tally.images[item.split] -= 1
                continue
            key = path.relative_to(folder.images).as_posix()
            key = key.encode("utf-8", "replace").decode()  # a table holds no lone surrogates
            typed = {column: _typed(item.columns.get(column), value)
                     for column, value in kind.columns.items()}
            writers[item.split].add({"image": {"bytes": content, "path": key.rpartition("/")[2]},
                                     "captions": captions, "key": key, **typed}, len(content))
        files = [file for writer in writers.values() for file in writer.finish()]

        report = {"pairs": dict(tally.images), "missing": len(tally.missing),
                  "missing_such_as": tally.missing[:NAMED_MISSING],
                  "dropped": {reason: count for reason, count in tally.problems.items() if count},
                  "annotations": [str(path) for path in folder.files[:20]],
                  "images_below": str(folder.images),
                  "seconds": round(time.monotonic() - started, 1)}
        (aside / "README.md").write_text(_card(name, files, report), encoding="utf-8")
        return write_record(aside, f"import {name}", arguments, files, report)


def _typed(value: object, dtype: str) -> object:
    """Return a value of the source in the type of its column; None where it has none."""
    import pyarrow as pa

    try:
        return pa.scalar(value, dtype).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def _card(name: str, files: list[str], report: dict[str, Any]) -> str:
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in report["pairs"].items())
    return f"""{card_head(KINDS[name].licence, files)}
# {name}

Imported by `tokenloom data import {name}`; the bytes of the images are those of the source.

| split | images |
|---|---|
{rows}

Columns: `image`, `captions` (all of the image), `key` (its file), {", ".join(KINDS[name].columns)}.

{KINDS[name].terms}
"""
