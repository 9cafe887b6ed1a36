"""Difficult and broken image files as bytes, built here, for every test that reads images."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

RED, BLUE = (220, 20, 30), (20, 30, 220)


def encode(image: Image.Image, format_name: str, **options) -> bytes:
    """Return an image as the bytes of a file."""
    file = BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def photo(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Noise over a ramp: compresses badly, so that cutting the file cuts pixels."""
    ramp = np.linspace(0, 160, width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 96, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def half_red() -> Image.Image:
    """40 x 24, red above blue, so that a rotation shows."""
    image = Image.new("RGB", (40, 24), BLUE)
    image.paste(RED, (0, 0, 40, 12))
    return image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """Return a hand-made PNG file, for depths and sizes that Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    data = zlib.compress(rows)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def empty() -> bytes:
    """A file of 0 bytes."""
    return b""


def text_file() -> bytes:
    """An error page that a crawler saved as .png."""
    return b"<!doctype html><title>404 not found</title>\n" * 20


def truncated(format_name: str) -> bytes:
    """The first half of a file."""
    data = encode(photo(), format_name)
    return data[:len(data) // 2]


def png_without_end() -> bytes:
    """A PNG that lacks only its last chunk: every pixel is there, so it is accepted."""
    return encode(photo(), "PNG")[:-12]


def corrupt_png() -> bytes:
    """Compressed rows overwritten in the middle."""
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2:len(data) // 2 + 200] = bytes(200)
    return bytes(data)


def corrupt_header() -> bytes:
    """A PNG signature with noise behind it."""
    return b"\x89PNG\r\n\x1a\n" + b"\x07" * 200


def bomb() -> bytes:
    """30000 x 30000 declared (2.7 GB decoded) in under 1 KB."""
    return raw_png(30_000, 30_000, 8, 2, bytes(90_001))


def small_bomb() -> bytes:
    """6000 x 6000 declared: below Pillow's limits, above ours."""
    return raw_png(6_000, 6_000, 8, 2, bytes(18_001))


def tiff() -> bytes:
    """A whole image in a format outside the allow-list."""
    return encode(photo(), "TIFF")


def animated(format_name: str) -> bytes:
    """GIF or WEBP: a red frame, then a blue one."""
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    options = {"lossless": True} if format_name == "WEBP" else {}
    return encode(frames[0], format_name, save_all=True, append_images=frames[1:], duration=100,
                  **options)


def cmyk_jpeg() -> bytes:
    """Red in CMYK."""
    return encode(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95)


def grey16_png() -> bytes:
    """16-bit grey, 4 x 1: 0, 0x4000, 0x8000, 0xffff."""
    return raw_png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 0x4000, 0x8000, 0xFFFF))


def rgb16_png() -> bytes:
    """16-bit RGB, 2 x 1: (0x8000, 0, 0xffff) and black."""
    return raw_png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0x8000, 0, 0xFFFF, 0, 0, 0))


def grey_alpha_png() -> bytes:
    """LA, 2 x 1: black opaque, black transparent."""
    return raw_png(2, 1, 8, 4, b"\0" + bytes((0, 255, 0, 0)))


def half_transparent_png() -> bytes:
    """RGBA, 2 x 1: red at half opacity, blue fully transparent."""
    image = Image.new("RGBA", (2, 1), (*BLUE, 0))
    image.putpixel((0, 0), (*RED, 128))
    return encode(image, "PNG")


def palette_png() -> bytes:
    """Palette with a transparent entry, 2 x 1: red, transparent."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return encode(image, "PNG", transparency=1)


def rotated_jpeg() -> bytes:
    """Stored 40 x 24, red above blue, with EXIF orientation 6.

    Upright it is 24 x 40, blue left, red right.
    """
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(half_red(), "JPEG", quality=95, exif=exif)


def broken_exif_jpeg() -> bytes:
    """Whole pixels with an EXIF block of noise."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30
    return encode(half_red(), "JPEG", quality=95, exif=exif)


def very_wide_png() -> bytes:
    """20000 x 1: resizing its shorter side to 32 before cutting would make 640,000 x 32."""
    return encode(Image.new("RGB", (20_000, 1), RED), "PNG")


# name -> (bytes, the reason that open_image gives)
REFUSED = {
    "empty": (empty(), "empty file"),
    "text": (text_file(), "not an image"),
    "truncated png": (truncated("PNG"), "truncated"),
    "truncated jpeg": (truncated("JPEG"), "truncated"),
    "truncated webp": (truncated("WEBP"), "truncated"),
    "truncated gif": (truncated("GIF"), "truncated"),
    "truncated bmp": (truncated("BMP"), "truncated"),
    "corrupt png": (corrupt_png(), "corrupt"),
    "corrupt header": (corrupt_header(), "corrupt"),
    "bomb": (bomb(), "too many pixels"),
    "small bomb": (small_bomb(), "too many pixels"),
    "tiff": (tiff(), "unknown format"),
}
ACCEPTED = {
    "png without end": png_without_end(),
    "animated gif": animated("GIF"),
    "animated webp": animated("WEBP"),
    "cmyk": cmyk_jpeg(),
    "grey16": grey16_png(),
    "rgb16": rgb16_png(),
    "grey+alpha": grey_alpha_png(),
    "alpha": half_transparent_png(),
    "palette+alpha": palette_png(),
    "rotated": rotated_jpeg(),
    "broken exif": broken_exif_jpeg(),
    "very wide": very_wide_png(),
}
