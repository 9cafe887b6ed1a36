"""`tokenloom reconstruct`: its options, and the check of --out before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence

from inference.commands.options import add_revision, check_pictures_folder, command_parser
from inference.shipped import default_model_folder
from tokenloom_common.errors import OneLineParser
from tokenloom_common.imports import importing_torch
from tokenloom_common.outputs import BLOCK_BYTES


def reconstruct(argv: Sequence[str] | None = None) -> int:
    """Write each image beside its reconstruction, and print its PSNR.

    1 if some could not be read.
    """
    args = _parser().parse_args(argv)
    out = check_pictures_folder(args.out, args.model, len(args.image) * BLOCK_BYTES)
    if args.model is None:
        args.model = str(default_model_folder())
    with importing_torch():  # takes seconds
        from inference.commands.rebuild_pictures import rebuild_pictures

    return rebuild_pictures(args, out)


def _parser() -> OneLineParser:
    parser = command_parser(
        "reconstruct",
        "Send pictures through the image tokenizer and back: original left, reconstruction right.",
        "  tokenloom reconstruct cat.png\n"
        "  tokenloom reconstruct cat.png dog.jpg --model demo/model --out reconstructions\n"
        "  tokenloom reconstruct photo.jpg --model demo/model --tiles --out reconstructions")
    parser.add_argument("image", nargs="+", help="picture files")
    parser.add_argument(
        "--model", help="model folder or hub id, or that of an image tokenizer (default: the model "
        "that ships with Tokenloom)")
    add_revision(parser)
    parser.add_argument(
        "--out", default="reconstructions",
        help="folder for the pictures; files there are never overwritten (default: "
        "reconstructions)")
    parser.add_argument(
        "--tiles", action="store_true", help="keep each picture's own size, in overlapping tiles "
        "of the tokenizer's resolution (default: its centre square, resized to that resolution)")
    parser.add_argument(
        "--max-pixels", type=int, metavar="N",
        help="width x height of the largest picture that is read (default 25,000,000); "
        "a larger JPEG is read at 1/2, 1/4 or 1/8 of its size, except with --tiles; others are "
        "refused")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    return parser
