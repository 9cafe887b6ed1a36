"""`tokenloom generate`: its options, and the check of --out before anything slow is imported."""

from __future__ import annotations

from collections.abc import Sequence

from inference.commands.hook_options import add_hook_options
from inference.commands.options import (
    add_revision,
    add_sampling_options,
    add_speed_options,
    caption_text,
    check_pictures_folder,
    command_parser,
)
from inference.commands.picture_index import check_index
from inference.shipped import default_model_folder
from tokenloom_common.errors import OneLineParser, UserError
from tokenloom_common.imports import importing_torch
from tokenloom_common.outputs import BLOCK_BYTES


def generate(argv: Sequence[str] | None = None) -> int:
    """Write one file per image, and print the files' names.

    1 if an image could not be drawn, or was refused.
    """
    args = _parser().parse_args(argv)
    if not args.prompt and args.prompts is None and args.from_image is None:
        raise UserError('no prompt given; for example: tokenloom generate "octopus"')
    # of a prompts file, the number of pictures is known once it is read
    least = len(args.prompt) * max(args.num_images, 1) * BLOCK_BYTES
    out = check_pictures_folder(args.out, args.model, least)
    check_index(out)
    if args.model is None and args.from_image is None:
        default_model_folder()  # an installation without it is said at once
    with importing_torch():  # takes seconds
        from inference.commands.draw_captions import draw_captions

    return draw_captions(args, out)


def _parser() -> OneLineParser:
    parser = command_parser(
        "generate", "Sample pictures for captions.",
        '  tokenloom generate "octopus"\n'
        '  tokenloom generate "a cat" --num-images 4 --grid --guidance 2 --seed 7\n'
        '  tokenloom generate "a red heart" --model demo/model --out hearts\n'
        "  tokenloom generate --from-image pictures/octopus-seed0.png --seed 8\n"
        "  tokenloom generate --prompts prompts.jsonl --model demo/model --out pictures\n"
        '  tokenloom generate "a doggy" --expand known-concepts\n'
        '  tokenloom generate "a cat" --safety words,nsfw')
    parser.add_argument(
        "prompt", nargs="*", type=caption_text, help="one or more captions, each in quotes")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="captions from a text file instead: a caption a line, or .jsonl with objects such as "
        '{"prompt": "a red heart", "seed": 7, "num_images": 2, "guidance_scale": 3}; what a line '
        "does not say comes from the options. With the same --out again it goes on where it "
        "stopped: pictures that are there are not drawn again")
    parser.add_argument(
        "--from-image", metavar="FILE",
        help="draw a picture again from the recipe in its file, byte for byte; options given "
        "beside it replace the recipe's (a caption, --seed, --guidance, --model, ...)")
    _add_model_options(parser)
    _add_output_options(parser)
    _add_drawing_options(parser)
    add_speed_options(parser)
    add_hook_options(parser)
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    return parser


def _add_model_options(parser: OneLineParser) -> None:
    parser.add_argument(
        "--model", help="model folder or hub id (default: the model that ships with Tokenloom)")
    add_revision(parser)
    parser.add_argument(
        "--text-encoder",
        help="where the model's frozen text encoder is, if not where it was at training")


def _add_output_options(parser: OneLineParser) -> None:
    parser.add_argument(
        "--out", default="pictures", help="folder for the pictures and their index.jsonl; pictures "
        "there are never overwritten (default: pictures)")
    parser.add_argument(
        "--output-format", choices=("png", "jpeg", "webp"),
        help="of the files (default: png; with --from-image, that file's); WebP is lossless")
    parser.add_argument(
        "--grid", action="store_true", help="also write grid.png, all pictures on one sheet")
    parser.add_argument(
        "--no-metadata", action="store_true",
        help="write nothing but the picture into its file: no prompt, seed or parameters, no mark "
        "that it was generated (index.jsonl still has them)")


def _add_drawing_options(parser: OneLineParser) -> None:
    parser.add_argument(
        "--num-images", type=int, default=1, help="pictures per caption (default 1)")
    parser.add_argument(
        "--seed", type=int, help="picture i uses seed + i (default 0)")
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
        "--batch-size", type=int, default=32, help="pictures drawn at a time (default 32)")
