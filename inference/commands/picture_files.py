"""Write generated images: file names, PNG metadata, output folders."""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenloom_common.errors import RunFailedError

PNG_KEY = "tokenloom"
"""Text chunk of a PNG file that holds everything needed to draw the image again."""


def png_metadata(values: dict[str, Any]) -> PngInfo:
    """Return `values` as the JSON text chunk PNG_KEY."""
    info = PngInfo()
    info.add_text(PNG_KEY, json.dumps(values))
    return info


def make_folder(out: Path) -> None:
    """Create the folder of --out, which was checked at the start of the command, if need be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailedError(f"{out}: could not be made ({error.strerror})") from None


def save_png(image: Image.Image, folder: Path, stem: str, info: PngInfo | None = None) -> Path:
    """Write a PNG file atomically under a free name, and return its path.

    That is the first of stem.png, stem-1.png, stem-2.png, ... which does not exist, also while
    other processes write there. RunFailedError with the path and the reason.
    """
    # cut, so that the name is not too long
    aside = folder / f".{stem[:100]}.{uuid.uuid4().hex[:8]}.tmp"
    path = folder / f"{stem}.png"
    try:
        image.save(aside, format="PNG", pnginfo=info)
        number = 0
        while not _reserve(path):
            number += 1
            path = folder / f"{stem}-{number}.png"
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunFailedError(f"{path}: could not be written ({error.strerror}); "
                             "pictures saved before it are whole") from None
    return path


def _reserve(path: Path) -> bool:
    """Make an empty file, for the picture to replace; False if the name is taken."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def slug(text: str) -> str:
    """Return a caption as part of a file name: "A red heart!" -> "a-red-heart"."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:60]
    # file systems limit the bytes of a name, most of them to 255; 60 characters may be more.
    # Under LC_ALL=C names may be ASCII alone
    encoding = sys.getfilesystemencoding()
    cut = words.encode(encoding, errors="ignore")[:180].decode(encoding, errors="ignore")
    return cut.lstrip("-_") or "picture"
