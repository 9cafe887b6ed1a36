"""Files and folders that appear whole or not at all: written aside, flushed, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError


def sync_path(path: Path) -> None:
    """fsync a file, or a folder's own entries."""
    descriptor = os.open(path, os.O_RDONLY)  # a folder can only be opened for reading
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """blake2b of a file's bytes, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):  # files may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder: a rename across file systems would be a copy, which a crash can cut
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name without content
        os.replace(aside, path)
        sync_path(path.parent)  # a rename is kept once the folder's entries are
    finally:
        aside.unlink(missing_ok=True)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write one JSON document, indented, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def refuse_others(path: Path, own: Sequence[str]) -> None:
    """UserError if `path` is a file, or a folder with an entry that matches no pattern in `own`."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a folder")
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in own)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(f"{path}: holds other files ({', '.join(others[:3])}{more}), which would "
                        "be lost; give another folder")
    if path.name in ("", ".."):  # Path(".").name is ""
        raise UserError(f"{path}: is replaced as a whole, which the folder that a command runs in "
                        "cannot be; give a name")


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Let an OSError name `path` if it names no file (a full disk), or the file written aside."""
    try:
        yield
    except OSError as error:
        aside = f".{path.name}."
        names_other = error.filename is not None and aside not in str(error.filename)
        # our own MissingFileError is an OSError without errno, and names its file already
        if error.errno is not None and not names_other:
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: Path, own: Sequence[str]) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends without an error it becomes `path`.

    An existing `path` is replaced as a whole, and stays as it was if the block fails. UserError if
    it holds an entry that matches no pattern in `own`.
    """
    refuse_others(path, own)  # before the work of the block
    if path.is_symlink():  # a rename would replace the link, not what it leads to
        path = path.resolve()
    with naming_path(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        aside.mkdir()
        try:
            yield aside
            publish_folder(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def publish_folder(aside: Path, path: Path) -> None:
    """Flush everything below `aside`, then rename it to `path`, replacing what is there."""
    for item in sorted(aside.rglob("*"), reverse=True):  # files before their folder
        sync_path(item)
    sync_path(aside)

    old = None
    if path.exists():  # a folder that is not empty cannot be renamed over
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(path, old)
    try:
        os.rename(aside, path)
    except OSError:  # put the old folder back
        if old is not None:
            os.rename(old, path)
        raise
    sync_path(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)  # the new folder is in place: rests do no harm
