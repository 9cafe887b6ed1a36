"""The work of `tokenloom reconstruct`: send images through the image tokenizer and back."""

# Axes: H W pixels

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image

from inference.commands.picture_files import make_folder, save_picture
from inference.image_files.encode import encode_image
from inference.model_folder import load_image_tokenizer
from tokenizer_image import ImageTokenizer
from tokenizer_image.images import (
    MAX_IMAGE_PIXELS,
    BadImageError,
    float_to_pixels,
    image_grid,
    image_to_pixels,
    open_image,
    pixels_to_float,
    pixels_to_images,
)
from tokenizer_image.tiling import decode_tiled, encode_tiled
from tokenloom_common.devices import choose_device
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.progress import progress

MAX_PSNR = 100.0  # dB, also of images that are equal


def rebuild_pictures(args: argparse.Namespace, out: Path) -> int:
    """Write each image beside its reconstruction into `out`, and print its PSNR.

    1 if some could not be read.
    """
    device = choose_device(args.device)
    if args.max_pixels is not None and args.max_pixels < 1:
        raise UserError(f"--max-pixels {args.max_pixels}: must be at least 1")
    tokenizer = load_image_tokenizer(args.model, device, args.revision)
    tokenizer.config.check_encodes(args.model)
    for name in args.image:  # a wrong name is said before any picture is drawn
        if not Path(name).exists():
            raise MissingFileError(f"{name}: no such file")
        if not Path(name).is_file():
            raise UserError(f"{name}: not a file; give the picture itself")
    make_folder(out)

    failed = 0
    for name in progress(args.image, "reconstruct", unit="picture"):
        try:
            pixels = _read_pixels(name, tokenizer, args)
        except BadImageError as error:
            if len(args.image) == 1:
                raise  # the only one: its error is the command's
            print(f"tokenloom reconstruct: skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        pair, psnr = _reconstruct(tokenizer, pixels, args.tiles, device)
        path = save_picture(encode_image(pair), out, f"{Path(name).stem}-reconstruction")
        print(f"{path}\t{psnr:.2f} dB")
    if failed == len(args.image):
        raise UserError(f"none of {failed} pictures could be read")
    return 1 if failed else 0


def _read_pixels(name: str, tokenizer: ImageTokenizer, args: argparse.Namespace) -> numpy.ndarray:
    """Read an image as uint8 [H, W, 3], at the tokenizer's resolution or (for tiles) at its own."""
    limit = MAX_IMAGE_PIXELS if args.max_pixels is None else args.max_pixels
    # a shrunk JPEG has not its own size any more
    image = open_image(Path(name), max_pixels=limit, shrink=not args.tiles,
                       limit_name="--max-pixels")
    if args.tiles:
        return _whole_cells(image, name, tokenizer)
    return image_to_pixels(image, tokenizer.config.resolution)


def _whole_cells(image: Image.Image, name: str, tokenizer: ImageTokenizer) -> numpy.ndarray:
    """Crop the image's centre to whole code cells, uint8 [H, W, 3].

    BadImageError if it is too small.
    """
    cell, side = tokenizer.config.downsampling, tokenizer.config.resolution
    full_width, full_height = image.size
    width = full_width // cell * cell
    height = full_height // cell * cell
    if min(width, height) < side:
        raise BadImageError(
            name, "too small", f"{full_width} x {full_height} pixels, tiles need {side} x {side} "
            "or more; leave --tiles out")
    left = (full_width - width) // 2
    top = (full_height - height) // 2
    pixels = numpy.asarray(image.convert("RGB"))
    # in numpy: Pillow's crop has a limit of its own
    return pixels[top: top + height, left: left + width].copy()


def _reconstruct(tokenizer: ImageTokenizer, pixels: numpy.ndarray, tiled: bool,
                 device: str) -> tuple[Image.Image, float]:
    """Return original and reconstruction side by side, and the PSNR in dB; pixels [H, W, 3]."""
    original = torch.from_numpy(pixels)[None]  # [1, H, W, 3]
    image = pixels_to_float(original).to(device)
    if tiled:
        decoded = decode_tiled(tokenizer, encode_tiled(tokenizer, image))
    else:
        decoded = tokenizer.decode(tokenizer.encode(image))
    rebuilt = float_to_pixels(decoded).cpu()

    # of uint8 pixels, as they are saved: peak 255
    error = float((original.double() - rebuilt.double()).square().mean())
    psnr = MAX_PSNR
    if error > 0:
        psnr = min(MAX_PSNR, float(10 * numpy.log10(255.0**2 / error)))
    pair = pixels_to_images(torch.cat([original, rebuilt]))
    return image_grid(pair, columns=2), psnr
