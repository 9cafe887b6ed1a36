"""`tokenloom reconstruct`: send images through the image tokenizer and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image

from inference.commands.options import (
    _parser,
    add_revision,
    choose_device,
)
from inference.commands.picture_files import _free_name, _output_folder, _save_png
from inference.model_folder import (
    load_image_tokenizer,
)
from tokenizer_image import ImageTokenizer
from tokenizer_image.images import (
    BadImageError,
    float_to_pixels,
    image_grid,
    image_to_pixels,
    open_image,
    pixels_to_float,
    pixels_to_images,
)
from tokenizer_image.tiling import decode_tiled, encode_tiled
from tokenloom_common.errors import UserError
from tokenloom_common.progress import progress


def reconstruct(argv: Sequence[str] | None = None) -> int:
    """`tokenloom reconstruct`: each picture beside what the tokenizer keeps of it, with its PSNR on stdout."""
    parser = _parser("reconstruct", "Send pictures through the image tokenizer and back: original left, reconstruction right.",
                     "  tokenloom reconstruct cat.png dog.jpg --model demo/model --out reconstructions\n"
                     "  tokenloom reconstruct photo.jpg --model demo/model --tiles --out reconstructions")
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument("--model", required=True, help="model folder or hub id, or that of an image tokenizer")
    add_revision(parser)
    parser.add_argument("--out", required=True, help="folder for the pictures; files there are never overwritten")
    parser.add_argument("--tiles", action="store_true", help="keep each picture's own size, in overlapping tiles of the "
                        "tokenizer's resolution (default: its centre square, resized to that resolution)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    tokenizer = load_image_tokenizer(args.model, device, args.revision)
    tokenizer.config.check_encodes(args.model)
    out = _output_folder(args.out)
    failed = 0
    for name in progress(args.image, "reconstruct", unit="picture"):
        try:
            picture = open_image(Path(name))
            pixels = (_whole_cells(picture, name, tokenizer) if args.tiles
                      else image_to_pixels(picture, tokenizer.config.resolution))
        except BadImageError as error:
            if len(args.image) == 1:
                raise
            print(f"tokenloom reconstruct: skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        both, decibel = _both(tokenizer, pixels, args.tiles, device)
        path = _free_name(out, f"{Path(name).stem}-reconstruction")
        _save_png(both, path)
        print(f"{path}\t{decibel:.2f} dB")
    if failed == len(args.image):
        raise UserError(f"none of {failed} pictures could be read")
    return 1 if failed else 0


def _whole_cells(picture: Image.Image, name: str, tokenizer: ImageTokenizer) -> numpy.ndarray:
    """The picture at its own size, uint8 [H, W, 3], its sides cut to whole code cells. BadImageError if it is too small."""
    cell, side = tokenizer.config.downsampling, tokenizer.config.resolution
    width, height = (length // cell * cell for length in picture.size)
    if min(width, height) < side:
        raise BadImageError(name, "too small",
                            f"{picture.size[0]} x {picture.size[1]} pixels, tiles need {side} x {side} or more; "
                            "leave --tiles out")
    left, top = (picture.size[0] - width) // 2, (picture.size[1] - height) // 2
    return numpy.array(picture.convert("RGB").crop((left, top, left + width, top + height)))


def _both(tokenizer: ImageTokenizer, pixels: numpy.ndarray, tiled: bool, device: str) -> tuple[Image.Image, float]:
    """Original and reconstruction side by side, and the PSNR in dB; pixels [H, W, 3]."""
    original = torch.from_numpy(pixels)[None]  # [1, H, W, 3]
    image = pixels_to_float(original).to(device)
    rebuilt = decode_tiled(tokenizer, encode_tiled(tokenizer, image)) if tiled else tokenizer.decode(tokenizer.encode(image))
    rebuilt = float_to_pixels(rebuilt).cpu()
    error = float((original.double() - rebuilt.double()).square().mean())
    decibel = 100.0 if error == 0 else min(100.0, float(10 * numpy.log10(255.0**2 / error)))
    return image_grid(pixels_to_images(torch.cat([original, rebuilt])), columns=2), decibel
