"""Open image files of any size: Pillow's formats without its global limit, JPEGs at a fraction.

The size that a header states is checked by the caller, before anything is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

MAX_SHRUNK_PIXELS = 1_000_000_000
"""Of a JPEG that is decoded at a fraction of its size; decoding takes 10 seconds for so many."""
MAX_PROGRESSIVE_PIXELS = 300_000_000
"""Of a progressive one, whose coefficients are in memory whole: up to 6 bytes a pixel."""
MIN_SHRUNK_SIDE = 512
"""Least shorter side after shrinking: a long strip would lose what the resolution could show."""


def open_image_file(file: BinaryIO, formats: Sequence[str]) -> Image.Image:
    """Read the header of an image file, as Image.open does but for its check of the size.

    Image.open refuses by a global of Pillow's, which may not be changed under other users of the
    process. Raises UnidentifiedImageError for a file of no such format.
    """
    file.seek(0)
    prefix = file.read(16)
    Image.preinit()  # loads the common formats, once
    for name in formats:
        if name not in Image.OPEN:
            Image.init()  # all others
        factory, accept = Image.OPEN[name]
        # accept gives a text for what this build of Pillow cannot read
        if accept is not None and accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise UnidentifiedImageError("no format of these")


def shrink_jpeg(image: Image.Image, max_pixels: int) -> bool:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size, the largest within `max_pixels`.

    False, and nothing changed, for other formats, for more than MAX_SHRUNK_PIXELS and where
    the shorter side would fall below MIN_SHRUNK_SIDE. The decoder then never holds the whole image,
    except for progressive files, of which it needs all coefficients.
    """
    if not isinstance(image, JpegImageFile):
        return False
    width, height = image.size
    is_progressive = bool(image.info.get("progressive"))
    most = MAX_PROGRESSIVE_PIXELS if is_progressive else MAX_SHRUNK_PIXELS
    if width * height > most:
        return False

    for factor in (2, 4, 8):
        shrunk_width, shrunk_height = -(-width // factor), -(-height // factor)  # rounded up
        if min(shrunk_width, shrunk_height) < MIN_SHRUNK_SIDE:
            return False
        if shrunk_width * shrunk_height <= max_pixels:
            # draft takes the smallest fraction that is not below the size asked for
            image.draft(None, (width // factor, height // factor))
            return image.size == (shrunk_width, shrunk_height)
    return False
