"""`tokenloom evaluate`: measure a trained model, and record what each number depends on."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.commands.options import add_sampling_options
from tokenloom_common.errors import OneLineParser, UserError, nearest_name
from training.commands.reading_options import add_reading_options, given_reading
from training.evaluation.options import (
    COMPOSITION_CHOICES,
    GENERATOR_COMMAND,
    TOKENIZER_COMMAND,
    EvaluationOptions,
    GeneratorEvaluationOptions,
    TokenizerEvaluationOptions,
)
from training.evaluation.report_place import check_generator_place, check_tokenizer_place

EXAMPLES = """examples:
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --split unseen_concept \\
      --out results/tokenizer
  tokenloom evaluate generator --model demo/model --data data/emoji --split unseen_style \\
      --out results/generator
"""
TOKENIZER_EXAMPLES = """examples:
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --split unseen_concept \\
      --out results/tokenizer
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --num-images 2000 \\
      --lpips vgg16 --out results/sample
  tokenloom evaluate tokenizer --model demo/model --data data/emoji \\
      --save-reference emoji.npz --out results/first
"""
GENERATOR_EXAMPLES = """examples:
  tokenloom evaluate generator --model RUN/model --data data/emoji --split unseen_style \\
      --matcher MATCHER --out results/new
  tokenloom evaluate generator --model RUN/model --data data/shapes --guidance 1 1.5 2 3 5 \\
      --out results/guidance
  tokenloom evaluate generator --model RUN/model --data photos --features none \\
      --num-captions 100 --out results/loss
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0. Raises UserError and its kin."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        _parser().parse_args([])  # exits: an argument is missing
    if arguments[0] in ("-h", "--help"):
        _parser().parse_args(["--help"])
    name = arguments[0]
    if name not in SUBCOMMANDS:
        raise UserError(f"unknown thing to evaluate '{name}'{nearest_name(name, SUBCOMMANDS)}")
    return SUBCOMMANDS[name](arguments[1:])


# ---- options ----

def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tokenloom evaluate", description=__doc__, epilog=EXAMPLES,
                           allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(SUBCOMMANDS),
                        help="what to measure; each has --help")
    return parser


def _tokenizer_parser() -> OneLineParser:
    parser = OneLineParser(prog=f"tokenloom {TOKENIZER_COMMAND}", epilog=TOKENIZER_EXAMPLES,
                           description="Send pictures through an image tokenizer and back, and "
                           "measure what is lost.", allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True,
                        help="model folder, or the folder of an image tokenizer")
    parser.add_argument("--data", required=True,
                        help="folder, parquet file, tar shards or hub id, as for training")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--num-images", type=int, metavar="N",
                        help="a seeded sample of N pictures (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample (default 0)")
    parser.add_argument("--batch-size", type=int, default=64,
                        help="pictures at a time; changes no number (default 64)")
    parser.add_argument("--lpips", default="alexnet", metavar="alexnet|vgg16|none",
                        help="LPIPS network (default alexnet)")
    _add_features(parser)
    parser.add_argument("--save-reference", type=Path, metavar="FILE.npz",
                        help="save the statistics of the measured pictures, for --reference")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    parser.add_argument("--out", required=True, help="folder for report.json and side_by_side.png")
    add_reading_options(parser)
    return parser


def _generator_parser() -> OneLineParser:
    parser = OneLineParser(prog=f"tokenloom {GENERATOR_COMMAND}", epilog=GENERATOR_EXAMPLES,
                           description="Sample a text-to-image model on the captions of a split, "
                           "and measure the pictures.", allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True,
                        help="folder, parquet file, tar shards or hub id, as for training")
    parser.add_argument("--split", help="default: train, or the only one; choose one that the "
                        "model was not trained on")
    parser.add_argument("--num-captions", type=int, metavar="N",
                        help="a seeded sample of N rows (default: 500, or all)")
    parser.add_argument("--seed", type=int, default=0,
                        help="decides the sample; picture k is drawn with seed + k (default 0)")
    add_sampling_options(parser, several_scales=True)
    parser.add_argument("--matcher", metavar="DIR", help="scores captions against pictures: "
                        "RUN/model of train_matcher, a CLIP or a SigLIP (default: not measured)")
    parser.add_argument("--nearest-split", metavar="SPLIT", help="also report the share of pictures"
                        " whose nearest one of this split (16 x 16 RGB) shows what was asked for; "
                        "give the split of training (default: not measured)")
    _add_features(parser)
    parser.add_argument("--diversity-captions", type=int, metavar="N", help="captions that are "
                        "sampled several times and compared; 0 = none (default 16)")
    parser.add_argument("--diversity-images", type=int, metavar="M",
                        help="pictures of each of these captions (default 4)")
    parser.add_argument("--composition", choices=COMPOSITION_CHOICES, default="auto",
                        help="check colours, shapes, counts and relations in the pictures; auto: "
                        "for data of `tokenloom data shapes`")
    parser.add_argument("--layout-column", help="column with the classes, for models with a "
                        "layout of classes (default layout)")
    parser.add_argument("--text-encoder", help="where the model's frozen text encoder is, if not "
                        "where it was at training")
    parser.add_argument("--batch-size", type=int, default=64,
                        help="pictures at a time (default 64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    parser.add_argument("--out", required=True, help="folder for report.json, contact_sheet.png "
                        "and, with several guidance scales, guidance.png")
    add_reading_options(parser)
    return parser


def _add_features(parser: OneLineParser) -> None:
    # no choices: the table of extractors imports torch
    parser.add_argument("--features", default="effnet-lite0", metavar="effnet-lite0|inception|none",
                        help="features of the Frechet distance (default effnet-lite0)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE",
                        help="weights for --features inception")
    parser.add_argument("--reference", type=Path, metavar="FILE.npz",
                        help="measure the Frechet distance against these statistics of real "
                        "pictures")


def _fields(options: type[EvaluationOptions], args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are fields of an options class, which have the same names."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(options)}


# ---- subcommands ----

def evaluate_tokenizer_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom evaluate tokenizer`: write a folder, print the headline numbers."""
    args = _tokenizer_parser().parse_args(argv)
    args.reading = given_reading(args)
    options = TokenizerEvaluationOptions(**_fields(TokenizerEvaluationOptions, args))
    check_tokenizer_place(args.out, options.save_reference)
    # after the options are known to be right: this import takes seconds
    from training.evaluation.tokenizer_report import evaluate_tokenizer

    report = evaluate_tokenizer(args.model, args.data, options, split=args.split,
                                device=args.device, out=args.out)
    _print_metrics(report["metrics"])
    _print_notes(TOKENIZER_COMMAND, [report["frechet"]])
    return 0


def evaluate_generator_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom evaluate generator`: write a folder, print the headline numbers."""
    args = _generator_parser().parse_args(argv)
    args.reading = given_reading(args)
    options = GeneratorEvaluationOptions(**_fields(GeneratorEvaluationOptions, args))
    check_generator_place(args.out)
    # after the options are known to be right: these imports take seconds
    from training.evaluation.generator_report import evaluate_generator
    from training.evaluation.headline import headline

    report = evaluate_generator(args.model, args.data, options, split=args.split,
                                device=args.device, out=args.out)
    runs = report["generated"]
    _print_metrics(report["metrics"])
    if len(runs) > 1:  # with one, its numbers are among the metrics
        for run in runs:
            scale = run["sampling"]["guidance_scale"]
            _print_metrics(headline(run), f"guidance {scale:g}: ")
    _print_notes(GENERATOR_COMMAND, [run.get("frechet") for run in runs])
    return 0


def _print_metrics(metrics: dict[str, dict[str, Any]], before: str = "") -> None:
    for name, metric in metrics.items():
        print(f"{before}{name}: {_shown(metric['value'])} {metric['unit']}")


def _print_notes(command: str, frechet_sections: Sequence[dict[str, Any] | None]) -> None:
    """Print each note of a Frechet distance once, to stderr."""
    # stdout has only `name: value unit` lines
    notes = [section["note"] for section in frechet_sections if section]
    for note in dict.fromkeys(notes):
        if note:
            print(f"tokenloom {command}: note: {note}", file=sys.stderr)


def _shown(value: float) -> str:
    """Format a value: four digits after the point, or four digits of a small number."""
    if isinstance(value, int):  # a count of images
        return f"{value:,}"
    if 0 < abs(value) < 0.01:
        return f"{value:.4g}"
    return f"{value:.4f}"


SUBCOMMANDS: dict[str, Callable[[Sequence[str] | None], int]] = {
    "tokenizer": evaluate_tokenizer_command,
    "generator": evaluate_generator_command,
}
"""What can be measured -> a function of its arguments."""
