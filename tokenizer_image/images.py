"""Images in and out: a guarded reader, resize and crop, and the map from uint8 to [-1, 1].

Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tokenizer_image.large_images import open_image_file, shrink_jpeg
from tokenloom_common.errors import MissingFileError, UserError, one_line

MAX_IMAGE_PIXELS = 25_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no others: their decoders are where the CVEs are
READ_HINT = f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"

# exceptions of Pillow's decoders on damaged files
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError,
                 struct.error, zlib.error)
# formats that people do have, by their first bytes, for the message: (offset, bytes, name)
_OTHER_FORMATS = (
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (4, b"ftyp", "HEIC/AVIF or video"),
    (0, b"%PDF", "PDF"), (0, b"<svg", "SVG"), (0, b"8BPS", "Photoshop"),
    (0, b"\0\0\0\x0cjP", "JPEG 2000"), (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\1\0", "ICO"))
_POINTERS = {b"version https://git-lfs": "Git LFS: run `git lfs pull`",
             b"/annex/objects/": "git-annex: run `git annex get`"}
_OUR_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"BM")


class BadImageError(UserError):
    """An unusable image. `reason` is short and the same for every such file, to be counted."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {reason}: {detail}")
        self.name = name
        self.reason = reason
        self.detail = detail

    # loader workers send errors pickled, and the message alone does not rebuild this one
    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.reason, self.detail)


# ---- reading

def open_image(source: str | Path | bytes, name: str | None = None,
               max_pixels: int = MAX_IMAGE_PIXELS, shrink: bool = True,
               limit_name: str | None = "max_pixels") -> Image.Image:
    """Read one image from a path or from a file's bytes -> RGB, upright, first frame, over white.

    The size is checked from the header, before anything is decoded. A JPEG of more than
    `max_pixels` is decoded at 1/2, 1/4 or 1/8 of its size, unless `shrink` is False; other formats
    cannot be, and are refused. `name` is used in messages and defaults to the path; limit_name:
    the option that raises the limit, None where there is none. BadImageError (with `.reason`) for
    a file that is empty, not an image, of another format, damaged or larger than `max_pixels`;
    MissingFileError for a missing path.
    """
    limit = _Limit(max_pixels, shrink, limit_name)
    if isinstance(source, bytes):
        return _read(BytesIO(source), name or "image", limit)

    path = Path(source)
    name = name or str(path)
    if not path.exists():
        raise MissingFileError(f"{name}: no such file")
    if not path.is_file():
        raise UserError(f"{name}: not a file; give the picture itself")
    try:
        with path.open("rb") as file:
            return _read(file, name, limit)
    except PermissionError:
        raise BadImageError(name, "unreadable",
                            "permission denied; check the file's permissions") from None


class _Limit(NamedTuple):
    """Arguments of open_image about the size of an image."""

    max_pixels: int
    shrink: bool
    limit_name: str | None


def _read(file: BinaryIO, name: str, limit: _Limit) -> Image.Image:
    head = file.read(32)
    file.seek(0)
    if not head:
        raise BadImageError(name, "empty file", "0 bytes; download or export it again")
    try:
        with warnings.catch_warnings():
            # of damaged EXIF and the like, which do not concern the pixels
            warnings.simplefilter("ignore")
            with open_image_file(file, FORMATS) as image:
                _check_size(image, name, limit)
                image.load()
                return to_rgb(_upright(image))
    except UnidentifiedImageError:
        raise _unidentified(head, name) from None
    except Image.DecompressionBombError:
        # its readers of WebP and GIF check once more
        detail = "more than Pillow reads of this format; resize it, or save it as a JPEG"
        raise BadImageError(name, "too many pixels", detail) from None
    except BadImageError:
        raise
    except DECODE_ERRORS as error:
        reason = "truncated" if _is_truncated(error, head, file) else "corrupt"
        detail = f"{one_line(error)}; download or export it again"
        raise BadImageError(name, reason, detail) from None


def _check_size(image: Image.Image, name: str, limit: _Limit) -> None:
    """Shrink a JPEG above the limit; BadImageError for what is above it and cannot be shrunk."""
    width, height = image.size
    if width * height <= limit.max_pixels:
        return
    if limit.shrink and shrink_jpeg(image, limit.max_pixels):
        return
    remedy = "resize it"
    if limit.limit_name is not None:
        remedy = f"resize it, or raise the limit ({limit.limit_name})"
    raise BadImageError(name, "too many pixels", f"{width} x {height} is over the limit of "
                        f"{limit.max_pixels:,}; {remedy}")


def _is_truncated(error: Exception, head: bytes, file: BinaryIO) -> bool:
    """Whether decoding failed because the end of the file is missing."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return True
    # WebP's decoder does not say why it failed; its header states how long the file should be
    if head.startswith(b"RIFF") and len(head) >= 8:
        stated_length = 8 + int.from_bytes(head[4:8], "little")
        return file.seek(0, 2) < stated_length
    return False


def _unidentified(head: bytes, name: str) -> BadImageError:
    """Return the error for a file that Pillow does not know, from its first bytes."""
    for start, remedy in _POINTERS.items():
        if head.startswith(start):
            return BadImageError(name, "not downloaded", f"a pointer of {remedy}")
    for offset, magic, format_name in _OTHER_FORMATS:
        if head[offset:].startswith(magic):
            return BadImageError(name, "unknown format", f"{format_name} is not read; {READ_HINT}")
    if head.startswith(_OUR_SIGNATURES):
        return BadImageError(name, "corrupt", "its header is damaged; download or export it again")
    return BadImageError(name, "not an image", f"no known picture format; {READ_HINT}")


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF orientation says."""
    # broken EXIF around whole pixels: viewers show such an image unrotated, and so do we
    with suppress(*DECODE_ERRORS):
        ImageOps.exif_transpose(image, in_place=True)  # not in place, it copies upright images too
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to 8-bit RGB. Transparency goes over white; 16-bit grey is scaled."""
    if image.mode.startswith("I"):  # Pillow's modes for 16-bit grey: I;16 and its byte orders, I
        return _grey16_to_rgb(image)
    if image.mode == "F":  # has no agreed range; taken as 0 to 255, as Pillow does
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        grey = np.clip(values, 0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:  # RGBA, LA, PA, and palette/RGB/grey with a transparent colour
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")  # always a new image, so the file behind `image` can be closed


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would clip it."""
    values = np.asarray(image, dtype=np.int64)
    grey = (np.clip(values, 0, 65535) + 128) // 257  # 65535 = 255 * 257, so white stays white
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, 255, grey)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


# ---- images <-> arrays

def image_to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> its centre square, resized with antialiasing, uint8 [size, size, 3]."""
    width, height = image.size
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    if side != size or width != height:
        # cropped while resizing: a 1 x 1,000,000 image would otherwise grow to size x (1e6 * size)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def pixels_to_float(pixels: Tensor | np.ndarray) -> Tensor:
    """Pixels uint8 [B, H, W, 3] -> image float32 [B, 3, H, W] in [-1, 1].

    ValueError on another dtype or shape.
    """
    pixels = torch.as_tensor(pixels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"expected uint8 pixels [B, H, W, 3], "
                         f"got {pixels.dtype} {list(pixels.shape)}")
    channels_first = pixels.permute(0, 3, 1, 2)
    image = channels_first.to(torch.float32, memory_format=torch.contiguous_format)
    return image / 127.5 - 1.0


def float_to_pixels(image: Tensor) -> Tensor:
    """Image float [B, 3, H, W], clamped to [-1, 1] -> pixels uint8 [B, H, W, 3].

    The inverse of `pixels_to_float`.
    """
    if not image.is_floating_point() or image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"expected a float image [B, 3, H, W], "
                         f"got {image.dtype} {list(image.shape)}")
    image = image.detach().float().nan_to_num(nan=0.0)  # a NaN has no uint8 value: make it grey
    levels = (image.clamp(-1.0, 1.0) + 1.0) * 127.5
    pixels = levels.round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def pixels_to_images(pixels: Tensor | np.ndarray) -> list[Image.Image]:
    """Pixels uint8 [B, H, W, 3] -> B PIL images."""
    arrays = np.asarray(torch.as_tensor(pixels).cpu())
    return [Image.fromarray(array) for array in arrays]


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Paste images on one white sheet in rows of `columns`; cells have the size of the largest."""
    if not images or columns < 1:
        raise ValueError("a grid needs at least 1 picture and 1 column, "
                         f"got {len(images)} and {columns}")
    columns = min(columns, len(images))
    width = max(image.width for image in images)
    height = max(image.height for image in images)

    sheet = Image.new("RGB", grid_size(len(images), columns, width, height, gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def grid_size(images: int, columns: int, width: int, height: int, gap: int = 2) -> tuple[int, int]:
    """Return width and height in pixels of the `image_grid` of images of width x height."""
    columns = min(columns, images)
    rows = -(-images // columns)  # rounded up
    # no gap behind the last column and row
    return columns * (width + gap) - gap, rows * (height + gap) - gap
