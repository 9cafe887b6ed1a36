"""`tokenloom train DATA --out MODEL --minutes N`: from a folder of captioned images to a model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tokenloom_common.errors import OneLineParser, UserError
from training.autotrain.overrides import split_overrides
from training.autotrain.places import check_places
from training.commands.reading_options import add_reading_options, given_reading

DESCRIPTION = """Train a text-to-image model on a folder of captioned images, in the minutes given.

Image size, models, batches and steps follow from the data, the machine and the time; --dry-run says
them and why. Every key of the training scripts can be set: --tokenizer.KEY VALUE,
--transformer.KEY VALUE."""
EXAMPLES = """examples:
  tokenloom train my_pictures --out my_model --minutes 60
  tokenloom train my_pictures --out my_model --minutes 60 --dry-run
  tokenloom train my_pictures --out my_model --minutes 20 --size 32 --from-scratch
  tokenloom train my_pictures --out my_model --minutes 60 --transformer.model.width 128 \\
      --tokenizer.optim.lr 0.002

Leaves my_model/ (the model folder, with samples.png, curves.png and report.html) and, beside it,
my_model.training/ (plan, data, tokens, runs and checkpoints; may be deleted when the model is
done). The same command goes on where it was stopped; the time before counts.
"""


def train(argv: Sequence[str] | None = None) -> int:
    """Check, choose, train and report; returns 0. Raises UserError and its kin."""
    started = time.monotonic()
    overrides, others = split_overrides(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(others)
    # the place first, then the data: neither needs torch
    check_places(arguments.out, arguments.data)
    reading = given_reading(arguments)

    from training.autotrain.choices import check_minutes
    from training.autotrain.job import train as run
    from training.autotrain.plan import TrainOptions, shipped_start
    from training.autotrain.recipes import check_overrides
    from training.autotrain.shapes import check_size
    from training.data.sources.drops import check_bad_fraction
    from training.data.sources.open_dataset import open_dataset
    from training.data.tokens.check import is_token_folder
    from training.loop.log import setup_console

    check_minutes(arguments.minutes)
    check_bad_fraction(arguments.max_bad_fraction)
    check_size(arguments.size)
    check_overrides(overrides)
    if is_token_folder(arguments.data):
        raise UserError(f"{arguments.data}: token shards, which training/train_seq2seq.py takes; "
                        "give captioned images")
    open_dataset(arguments.data, split=arguments.split, **reading)
    setup_console(is_first=True)
    # a model of the user's own shape cannot begin with another one's weights
    own_model = any(key.startswith("--model") for key in overrides["tokenizer"][::2])
    options = TrainOptions(
        data=arguments.data, out=arguments.out, minutes=arguments.minutes, split=arguments.split,
        size=arguments.size, seed=arguments.seed,
        start_from=None if arguments.from_scratch or own_model else shipped_start(),
        max_bad_fraction=arguments.max_bad_fraction, reading=reading, overrides=overrides)
    run(options, arguments.dry_run, started)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tokenloom train", epilog=EXAMPLES, allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of images with captions, parquet file, tar shards, "
                        "hub id; see `tokenloom data check`")
    parser.add_argument("--out", required=True, help="the model folder to write")
    parser.add_argument("--minutes", type=float, required=True,
                        help="time for everything, report included (1 or more)")
    parser.add_argument("--dry-run", action="store_true",
                        help="measure, say the choices, and stop (half a minute)")
    parser.add_argument("--from-scratch", action="store_true",
                        help="start from no trained model, also where that would help")
    parser.add_argument("--size", type=int, help="pixels on a side: 32, 64, 128 or 256")
    parser.add_argument("--split", "--data.split", help="of the data (default: train, or the only "
                        "one)")
    parser.add_argument("--seed", type=seed_number, default=0,
                        help="of weights, order and held-out images (default 0)")
    parser.add_argument("--max-bad-fraction", "--data.max_bad_fraction", type=float, default=0.01,
                        help="share of unusable images that is tolerated (default 0.01; ten "
                        "always are)")
    add_reading_options(parser)
    return parser


def seed_number(text: str) -> int:
    """Read a seed as the scripts take it; an argparse error for anything else."""
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 1 << 31:
        raise argparse.ArgumentTypeError(f"'{text}': give a number from 0 to {(1 << 31) - 1}")
    return number
