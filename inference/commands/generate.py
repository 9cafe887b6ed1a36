"""`tokenloom generate`: its options, and the check of --out before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence

from inference.commands.options import (
    add_revision,
    add_sampling_options,
    add_speed_options,
    caption_text,
    check_pictures_folder,
    command_parser,
)
from tokenloom_common.errors import OneLineParser
from tokenloom_common.imports import importing_torch
from tokenloom_common.outputs import BLOCK_BYTES


def generate(argv: Sequence[str] | None = None) -> int:
    """Write one PNG per image and a grid, and print the files' names.

    1 if an image could not be drawn.
    """
    args = _parser().parse_args(argv)
    # of a prompts file, the number of pictures is known once it is read
    least = len(args.prompt) * max(args.num_images, 1) * BLOCK_BYTES
    out = check_pictures_folder(args.out, args.model, least)
    with importing_torch():  # takes seconds
        from inference.commands.draw_captions import draw_captions

    return draw_captions(args, out)


def _parser() -> OneLineParser:
    parser = command_parser(
        "generate", "Sample pictures for captions.",
        '  tokenloom generate "a red heart" --model demo/model --out pictures\n'
        '  tokenloom generate "a cat" --model demo/model --num-images 4 --guidance 2 --seed 7 '
        "--out pictures\n"
        "  tokenloom generate --prompts prompts.jsonl --model demo/model --out pictures")
    parser.add_argument(
        "prompt", nargs="*", type=caption_text, help="one or more captions, each in quotes")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="captions from a text file instead: a caption a line, or .jsonl with objects such as "
        '{"prompt": "a red heart", "seed": 7, "num_images": 2, "guidance_scale": 3}; what a line '
        "does not say comes from the options")
    parser.add_argument("--model", required=True, help="model folder or hub id")
    add_revision(parser)
    parser.add_argument(
        "--out", required=True, help="folder for the pictures; files there are never overwritten")
    parser.add_argument(
        "--num-images", type=int, default=1, help="pictures per caption (default 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="picture i uses seed + i (default 0)")
    add_sampling_options(parser)
    parser.add_argument(
        "--negative-prompt", type=caption_text,
        help="text that guidance leads away from (default: no caption)")
    parser.add_argument(
        "--layout", help="for models with a layout: a picture (colours), or a .json file of class "
        "numbers, row after row (default: sampled)")
    parser.add_argument(
        "--attention", action="append", type=caption_text, metavar="WORD",
        help="also save where the picture attended to a word of the caption; may be given several "
        "times")
    parser.add_argument(
        "--rerank-from", type=int, metavar="N", help="draw N candidates per caption and keep the "
        "--num-images that a matcher finds to fit it best (needs --matcher)")
    parser.add_argument(
        "--matcher", metavar="DIR",
        help="folder of a matcher (RUN/model of train_matcher), a CLIP or a SigLIP")
    parser.add_argument(
        "--text-encoder",
        help="where the model's frozen text encoder is, if not where it was at training")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures decoded at a time (default 32)")
    add_speed_options(parser)
    parser.add_argument(
        "--no-metadata", action="store_true",
        help="leave prompt, seed and parameters out of the PNG files")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    return parser
