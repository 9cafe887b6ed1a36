"""Images as the bytes of a PNG, JPEG or WebP file, with their recipe inside.

| format | JSON, lossless                | A1111's text      | digitalSourceType      |
|--------|-------------------------------|-------------------|------------------------|
| PNG    | text chunk `tokenloom`        | chunk `parameters`| iTXt XML:com.adobe.xmp |
| JPEG   | comments (COM), see below     | EXIF UserComment  | APP1 XMP               |
| WebP   | XMP, element tokenloom:recipe | EXIF UserComment  | XMP                    |
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import PngInfo

from inference.image_files.infotext import infotext
from inference.image_files.recipe import Recipe, recipes_to_json
from inference.image_files.xmp import xmp_packet
from tokenloom_common.errors import UserError, choose

KEY = "tokenloom"
"""Text chunk of a PNG file that holds everything needed to draw the image again."""
XMP_KEY = "XML:com.adobe.xmp"
COMMENT_MARK = b"tokenloom:"
"""Begins each JPEG comment that holds a part of the JSON; they are joined in order."""
JPEG_QUALITY = 95
_COMMENT_BYTES = 65_000  # a segment of a JPEG file has at most 65,535 with its own header
_EXIF_CHARACTERS = 30_000  # UTF-16 units: EXIF is one such segment
_UNICODE = b"UNICODE\0"  # UserComment's code for Unicode text
_START_OF_IMAGE = b"\xff\xd8"


class Format(NamedTuple):
    """A file format: Pillow's name, the ending of files, the MIME type, most pixels of a side."""

    pillow: str
    ending: str
    mime: str
    max_side: int


FORMATS = {
    "png": Format("PNG", ".png", "image/png", (1 << 31) - 1),
    "jpeg": Format("JPEG", ".jpg", "image/jpeg", 65_500),  # libjpeg's own limit
    "webp": Format("WEBP", ".webp", "image/webp", (1 << 14) - 1),
}
"""Names of output formats."""


def encode_image(image: Image.Image, output_format: str = "png", compression: int | None = None,
                 recipe: Recipe | Sequence[Recipe] | None = None) -> bytes:
    """Return the bytes of an image file; the same image and arguments give the same bytes.

    compression: quality of JPEG (default 95) and WebP (default lossless), 0 to 100.
    recipe: of the image, or those of a grid's images in order; None writes no metadata at all.

    UserError for an unknown format, a compression outside of 0 to 100, or of PNG, which is lossless
    (100 is taken).
    """
    chosen = choose(FORMATS, output_format, "output format")
    _check_compression(output_format, compression)
    plain = image.convert("RGB")
    plain.info = {}  # Pillow would write some of it into the file

    options: dict[str, Any] = {}
    comments: list[bytes] = []
    if chosen.pillow == "JPEG":
        # 4:4:4: halved colours blur the edges of small images
        options = {"quality": JPEG_QUALITY if compression is None else compression,
                   "subsampling": 0}
    elif chosen.pillow == "WEBP":
        options = {"lossless": compression is None, "exact": True,
                   "quality": 100 if compression is None else compression}
    if recipe is not None:
        text, json_text = _texts(recipe, image.size)
        if chosen.pillow == "PNG":
            options["pnginfo"] = _png_info(text, json_text)
        elif chosen.pillow == "JPEG":
            options |= {"exif": _exif(text), "xmp": xmp_packet().encode()}
            comments = _comments(json_text)
        else:
            options |= {"exif": _exif(text), "xmp": xmp_packet(json_text).encode()}

    file = BytesIO()
    plain.save(file, format=chosen.pillow, **options)
    return _with_comments(file.getvalue(), comments)


def _check_compression(output_format: str, compression: int | None) -> None:
    if compression is None:
        return
    is_number = isinstance(compression, int) and not isinstance(compression, bool)
    if not is_number or not 0 <= compression <= 100:
        raise UserError(f"compression must be a whole number of 0 to 100, got {compression!r}")
    if output_format == "png" and compression != 100:
        raise UserError(f"compression {compression}: PNG is lossless; leave it out, or choose jpeg "
                        "or webp")


def _texts(recipe: Recipe | Sequence[Recipe], size: tuple[int, int]) -> tuple[str | None, str]:
    """Return A1111's text (None of a grid, for which it has no form) and the JSON."""
    if isinstance(recipe, Recipe):
        return infotext(recipe, size), recipe.to_json()
    return None, recipes_to_json(recipe)


def _png_info(text: str | None, json_text: str) -> PngInfo:
    info = PngInfo()
    if text is not None:
        info.add_text("parameters", text)  # Latin-1 as tEXt, all else as iTXt
    info.add_text(KEY, json_text)
    info.add_itxt(XMP_KEY, xmp_packet())
    return info


def _exif(text: str | None) -> bytes:
    """Return EXIF with the text as UserComment; nothing without one."""
    if text is None:
        return b""
    units = text.encode("utf-16-be")[: 2 * _EXIF_CHARACTERS]
    whole = units.decode("utf-16-be", "ignore").encode("utf-16-be")  # no half of a pair at the cut
    exif = Image.Exif()
    exif.get_ifd(IFD.Exif)[Base.UserComment] = _UNICODE + whole
    return exif.tobytes()


def _comments(json_text: str) -> list[bytes]:
    """Return the JSON as the bodies of JPEG comments."""
    raw = json_text.encode("ascii")
    return [COMMENT_MARK + raw[start:start + _COMMENT_BYTES]
            for start in range(0, len(raw), _COMMENT_BYTES)]


def _with_comments(jpeg: bytes, comments: list[bytes]) -> bytes:
    """Put comments into a JPEG file, behind the segments of JFIF, EXIF and XMP."""
    if not comments:
        return jpeg
    position = len(_START_OF_IMAGE)
    while jpeg[position] == 0xFF and 0xE0 <= jpeg[position + 1] <= 0xEF:  # APP0 to APP15
        position += 2 + int.from_bytes(jpeg[position + 2:position + 4], "big")
    segments = b"".join(b"\xff\xfe" + (len(body) + 2).to_bytes(2, "big") + body
                        for body in comments)
    return jpeg[:position] + segments + jpeg[position:]
