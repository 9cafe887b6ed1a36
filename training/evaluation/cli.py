"""`tokenloom evaluate tokenizer`: measure what is trained, with everything that a number depends on written beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import OneLineParser, UserError, nearest_name

EXAMPLES = """examples:
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --split unseen_concept --out results/tokenizer
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --num-images 2000 --lpips vgg16 --out results/sample
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --save-reference emoji.npz --out results/first
"""
COMMAND = "evaluate tokenizer"
MAX_SEED = 2**63 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0. Raises UserError and its kin."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _parser().parse_args(["--help"] if arguments else [])
    name = arguments[0]
    if name not in SUBCOMMANDS:
        raise UserError(f"unknown thing to evaluate '{name}'{nearest_name(name, SUBCOMMANDS)}")
    return SUBCOMMANDS[name](arguments[1:])


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tokenloom evaluate", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(SUBCOMMANDS), help="what to measure; each has --help")
    return parser


def _tokenizer_parser() -> OneLineParser:
    parser = OneLineParser(prog=f"tokenloom {COMMAND}", epilog=EXAMPLES, allow_abbrev=False,
                           description="Send pictures through an image tokenizer and back, and measure what is lost.",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or the folder of an image tokenizer")
    parser.add_argument("--data", required=True, help="folder, parquet file, tar shards or hub id, as for training")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--num-images", type=int, metavar="N", help="a seeded sample of N pictures (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample (default 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time; changes no number (default 64)")
    parser.add_argument("--lpips", default="alexnet", metavar="alexnet|vgg16|none", help="LPIPS network (default alexnet)")
    parser.add_argument("--features", default="effnet-lite0", metavar="effnet-lite0|inception|none",
                        help="features of the Frechet distance (default effnet-lite0)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="weights for --features inception")
    parser.add_argument("--reference", type=Path, metavar="FILE.npz",
                        help="measure the Frechet distance against these statistics of real pictures")
    parser.add_argument("--save-reference", type=Path, metavar="FILE.npz",
                        help="save the statistics of the pictures that are measured")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    parser.add_argument("--out", required=True, help="folder for report.json and side_by_side.png")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Mistakes that need no file to be seen."""
    if not args.out:
        raise UserError("--out is empty; give a folder")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give 1 or more")
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num-images {args.num_images}: give 1 or more, or leave it out for all")
    if not 0 <= args.seed <= MAX_SEED:
        raise UserError(f"--seed {args.seed}: give 0 to {MAX_SEED}")
    if args.features == "inception" and args.inception_weights is None:
        raise UserError("--features inception needs --inception-weights FILE: none can be shipped or downloaded here")
    if args.inception_weights is not None and args.features != "inception":
        raise UserError(f"--inception-weights is for --features inception, not {args.features}")
    if args.reference is not None and args.save_reference is not None:
        raise UserError("--reference and --save-reference: give one; with a reference no statistics are made of the pictures")
    for flag, path in (("--reference", args.reference), ("--save-reference", args.save_reference)):
        if path is not None and args.features == "none":
            raise UserError(f"{flag} holds features of pictures, and --features none asks for none")


def evaluate_tokenizer_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom evaluate tokenizer`: report.json and side_by_side.png in a folder, the headline numbers on stdout."""
    args = _tokenizer_parser().parse_args(argv)
    _check(args)
    # after the options are known to be right: these imports take seconds
    from training.evaluation.report import run_tokenizer_evaluation

    report = run_tokenizer_evaluation(args)
    for name, metric in report["metrics"].items():
        print(f"{name}: {_shown(metric['value'])} {metric['unit']}")
    note = (report["frechet"] or {}).get("note")
    if note:
        print(f"tokenloom {COMMAND}: note: {note}", file=sys.stderr)
    return 0


def _shown(value: float) -> str:
    """Four digits after the point, or four digits of a small number."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


SUBCOMMANDS: dict[str, Any] = {"tokenizer": evaluate_tokenizer_command}
"""What can be measured -> a function of its arguments."""
