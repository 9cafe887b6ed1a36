"""Recipes out of image files that anybody may have sent: no path in them is followed."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from inference.image_files.encode import COMMENT_MARK, FORMATS, KEY
from inference.image_files.recipe import Recipe, parse_recipes
from inference.image_files.xmp import recipe_in_xmp
from tokenizer_image.images import DECODE_ERRORS, MAX_IMAGE_PIXELS
from tokenizer_image.large_images import open_image_file
from tokenloom_common.errors import MissingFileError, UserError

MAX_FILE_BYTES = 64 << 20
_NAMES = {chosen.pillow: name for name, chosen in FORMATS.items()}


def read_recipe(data: bytes, name: str) -> Recipe:
    """Return the recipe that an image file carries.

    data: the file's bytes. name: of the file, in messages. UserError for a file that is none of
    FORMATS, too large or damaged, without a recipe, with a wrong one, or with those of a grid.
    """
    recipes, is_grid = _recipes(data, name)
    if is_grid:
        raise UserError(f"{name}: is a grid of {len(recipes)} pictures; give one of them")
    return recipes[0]


def read_recipes(data: bytes, name: str) -> list[Recipe]:
    """Return the recipe of an image, or those of a grid's images; see `read_recipe`."""
    recipes, _ = _recipes(data, name)
    return recipes


def read_image_file(path: Path, flag: str) -> bytes:
    """Return the bytes of a file that an option names. UserError for none, and for a large one."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{flag} {path}: not a file; give the picture itself")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{flag} {path}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or "not a file's name"
        raise UserError(f"{flag} {path}: cannot be read ({reason.lower()})") from None
    _check_size(data, f"{flag} {path}")
    return data


def image_format(data: bytes, name: str) -> str:
    """Return the name in FORMATS of an image file's format. UserError for any other file."""
    with _open(data, name) as image:
        return _NAMES[str(image.format)]


def _check_size(data: bytes, name: str) -> None:
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{name}: is larger than {MAX_FILE_BYTES >> 20} MiB; "
                        "give a picture that Tokenloom wrote")


def _open(data: bytes, name: str) -> Image.Image:
    """Open an image file, which reads its header and metadata."""
    _check_size(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF and the like
            image = open_image_file(BytesIO(data), tuple(_NAMES))
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a picture that can be read; give a PNG, JPEG or WebP file"
                        ) from None
    except Image.DecompressionBombError:  # from Pillow's reader of WebP
        raise _too_large(name) from None
    except DECODE_ERRORS:
        raise _damaged(name) from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(name)
    return image


def _too_large(name: str) -> UserError:
    return UserError(f"{name}: is over the limit of {MAX_IMAGE_PIXELS:,} pixels; give a picture "
                     "that Tokenloom wrote")


def _damaged(name: str) -> UserError:
    return UserError(f"{name}: is damaged; copy or download it again")


def _recipes(data: bytes, name: str) -> tuple[list[Recipe], bool]:
    """Return the recipes of a file, and whether they are those of a grid."""
    with _open(data, name) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = _json_of(image)
                is_foreign = text is None and "parameters" in image.info
        except DECODE_ERRORS:
            raise _damaged(name) from None
    if text is None:
        what = ("no recipe of Tokenloom (but parameters of another program)" if is_foreign
                else "no recipe: it was not drawn by Tokenloom, or its metadata was removed")
        raise UserError(f"{name}: holds {what}")
    try:
        return parse_recipes(text), text.lstrip().startswith("[")
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _json_of(image: Image.Image) -> str | None:
    """Return the JSON of the recipe in an open image; None without one."""
    if image.format == "PNG":
        if KEY not in image.info:
            image.load()  # programs that save it again put text behind the pixels
        text = image.info.get(KEY)
        return text if isinstance(text, str) else None
    if image.format == "JPEG":
        segments = getattr(image, "applist", [])
        parts = [body.removeprefix(COMMENT_MARK) for kind, body in segments
                 if kind == "COM" and body.startswith(COMMENT_MARK)]
        return b"".join(parts).decode("latin-1") if parts else None
    packet = image.info.get("xmp")
    return recipe_in_xmp(packet) if isinstance(packet, bytes) else None
