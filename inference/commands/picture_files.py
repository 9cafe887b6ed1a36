"""Write generated images: file names, folders, files that appear whole."""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from tokenloom_common.errors import RunFailedError

MAX_STEM_BYTES = 220
"""Of a file's name, which most file systems limit to 255: a number and the ending come behind."""


def make_folder(out: Path) -> None:
    """Create the folder of --out, which was checked at the start of the command, if need be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailedError(f"{out}: could not be made ({error.strerror})") from None


def save_picture(data: bytes, folder: Path, stem: str, ending: str = ".png",
                 known: Collection[str] | None = None) -> Path:
    """Write an image file's bytes atomically under a free name, and return its path.

    That is the first of stem.png, stem-1.png, stem-2.png, ... which does not exist, also while
    other processes write there; a stem above MAX_STEM_BYTES is cut. known: names of files that are
    accounted for; another one that holds these very bytes is taken instead of being written again.
    RunFailedError with the path and the reason.
    """
    stem = _cut(stem, MAX_STEM_BYTES)
    aside = folder / f".picture.{uuid.uuid4().hex[:8]}.tmp"
    path = folder / f"{stem}{ending}"
    number = 0
    try:
        aside.write_bytes(data)
        while not _publish(aside, path):
            if known is not None and path.name not in known and path.read_bytes() == data:
                break
            number += 1
            path = folder / f"{stem}-{number}{ending}"
    except OSError as error:
        raise RunFailedError(f"{path}: could not be written ({error.strerror}); "
                             "pictures saved before it are whole") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def _publish(aside: Path, path: Path) -> bool:
    """Give a written file its name; False if the name is taken."""
    try:
        os.link(aside, path)  # unlike a rename, fails if the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without links: an empty file reserves the name
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        os.replace(aside, path)
    return True


def slug(text: str) -> str:
    """Return a caption as part of a file name: "A red heart!" -> "a-red-heart"."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:60]
    # Under LC_ALL=C names may be ASCII alone
    encoding = sys.getfilesystemencoding()
    known = words.encode(encoding, errors="ignore").decode(encoding)
    return _cut(known, 180).lstrip("-_") or "picture"


def _cut(name: str, limit: int) -> str:
    """Return as many characters of a name as take at most `limit` bytes."""
    data = os.fsencode(name)
    if len(data) <= limit:
        return name
    return data[:limit].decode(sys.getfilesystemencoding(), errors="ignore")
