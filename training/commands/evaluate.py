"""`tokenloom evaluate`: measure what is trained, with everything that a number depends on written beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import OneLineParser, UserError, nearest_name

EXAMPLES = """examples:
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --split unseen_concept --out results/tokenizer
  tokenloom evaluate generator --model demo/model --data data/emoji --split unseen_style --out results/generator
"""
TOKENIZER_EXAMPLES = """examples:
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --split unseen_concept --out results/tokenizer
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --num-images 2000 --lpips vgg16 --out results/sample
  tokenloom evaluate tokenizer --model demo/model --data data/emoji --save-reference emoji.npz --out results/first
"""
GENERATOR_EXAMPLES = """examples:
  tokenloom evaluate generator --model RUN/model --data data/emoji --split unseen_style --matcher MATCHER --out results/new
  tokenloom evaluate generator --model RUN/model --data data/shapes --guidance 1 1.5 2 3 5 --out results/guidance
  tokenloom evaluate generator --model RUN/model --data photos --features none --num-captions 100 --out results/loss
"""
TOKENIZER_COMMAND, GENERATOR_COMMAND = "evaluate tokenizer", "evaluate generator"
MAX_SEED = 2**63 - 1
FURTHER_SEEDS = 2**32


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
    parser = OneLineParser(prog=f"tokenloom {TOKENIZER_COMMAND}", epilog=TOKENIZER_EXAMPLES, allow_abbrev=False,
                           description="Send pictures through an image tokenizer and back, and measure what is lost.",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, or the folder of an image tokenizer")
    parser.add_argument("--data", required=True, help="folder, parquet file, tar shards or hub id, as for training")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--num-images", type=int, metavar="N", help="a seeded sample of N pictures (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample (default 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time; changes no number (default 64)")
    parser.add_argument("--lpips", default="alexnet", metavar="alexnet|vgg16|none", help="LPIPS network (default alexnet)")
    _add_features(parser)
    parser.add_argument("--save-reference", type=Path, metavar="FILE.npz",
                        help="save the statistics of the pictures that are measured")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    parser.add_argument("--out", required=True, help="folder for report.json and side_by_side.png")
    return parser


def _generator_parser() -> OneLineParser:
    from inference.commands.options import add_sampling_options  # not above: it takes seconds

    parser = OneLineParser(prog=f"tokenloom {GENERATOR_COMMAND}", epilog=GENERATOR_EXAMPLES, allow_abbrev=False,
                           description="Ask a text-to-image model for the captions of a split, and measure what it draws.",
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--data", required=True, help="folder, parquet file, tar shards or hub id, as for training")
    parser.add_argument("--split", help="default: train, or the only one; measure on one that the model was not trained on")
    parser.add_argument("--num-captions", type=int, metavar="N", help="a seeded sample of N rows (default: 500, or all)")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample; picture k is drawn with seed + k (default 0)")
    add_sampling_options(parser, several_scales=True)
    parser.add_argument("--matcher", metavar="DIR", help="scores captions against pictures: RUN/model of train_matcher, a CLIP "
                        "or a SigLIP (default: not measured)")
    _add_features(parser)
    parser.add_argument("--diversity-captions", type=int, metavar="N",
                        help="captions of which several pictures are compared; 0 = none (default 16)")
    parser.add_argument("--diversity-images", type=int, metavar="M", help="pictures of each (default 4)")
    parser.add_argument("--composition", choices=("auto", "yes", "no"), default="auto",
                        help="check colours, shapes, counts and relations on the pictures; auto: for data of `tokenloom data "
                        "shapes`")
    parser.add_argument("--layout-column", help="column with the classes, for models with a layout of "
                        "classes (default layout)")
    parser.add_argument("--text-encoder", help="where the model's frozen text encoder is, if not where it was at training")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default 64)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    parser.add_argument("--out", required=True, help="folder for report.json, contact_sheet.png and, with several guidance "
                        "scales, guidance.png")
    return parser


def _add_features(parser: OneLineParser) -> None:
    parser.add_argument("--features", default="effnet-lite0", metavar="effnet-lite0|inception|none",
                        help="features of the Frechet distance (default effnet-lite0)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="weights for --features inception")
    parser.add_argument("--reference", type=Path, metavar="FILE.npz",
                        help="measure the Frechet distance against these statistics of real pictures")


def _check(args: argparse.Namespace) -> None:
    """Mistakes that need no file to be seen, in what both commands take."""
    if not args.out:
        raise UserError("--out is empty; give a folder")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give 1 or more")
    if not 0 <= args.seed <= MAX_SEED:
        raise UserError(f"--seed {args.seed}: give 0 to {MAX_SEED}")
    if args.features == "inception" and args.inception_weights is None:
        raise UserError("--features inception needs --inception-weights FILE: none can be shipped or downloaded here")
    if args.inception_weights is not None and args.features != "inception":
        raise UserError(f"--inception-weights is for --features inception, not {args.features}")
    if args.reference is not None and args.features == "none":
        raise UserError("--reference holds features of pictures, and --features none asks for none")


def _check_tokenizer(args: argparse.Namespace) -> None:
    _check(args)
    if args.num_images is not None and args.num_images < 1:
        raise UserError(f"--num-images {args.num_images}: give 1 or more, or leave it out for all")
    if args.reference is not None and args.save_reference is not None:
        raise UserError("--reference and --save-reference: give one; with a reference no statistics are made of the pictures")
    if args.save_reference is not None and args.features == "none":
        raise UserError("--save-reference holds features of pictures, and --features none asks for none")


def _check_generator(args: argparse.Namespace) -> None:
    _check(args)
    if args.num_captions is not None and args.num_captions < 2:
        raise UserError(f"--num-captions {args.num_captions}: give 2 or more, or leave it out")
    if args.seed > MAX_SEED - FURTHER_SEEDS:
        raise UserError(f"--seed {args.seed}: give at most {MAX_SEED - FURTHER_SEEDS}; each picture adds to it")
    scales = args.guidance or []
    if len(set(scales)) < len(scales):
        raise UserError(f"--guidance {' '.join(f'{scale:g}' for scale in scales)}: names a scale twice")
    captions, images = args.diversity_captions, args.diversity_images
    if captions is not None and (captions < 0 or captions == 1):
        raise UserError(f"--diversity-captions {captions}: give 2 or more, or 0 for none")
    if images is not None and images < 2:
        raise UserError(f"--diversity-images {images}: give 2 or more, which are compared with each other")
    if captions == 0 and images is not None:
        raise UserError(f"--diversity-images {images}: of no captions (--diversity-captions 0); leave one out")
    if args.features == "none" and (captions or images):
        raise UserError("--diversity-captions and --diversity-images compare features, and --features none asks for none; "
                        "leave them out")


def evaluate_tokenizer_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom evaluate tokenizer`: report.json and side_by_side.png in a folder, the headline numbers on stdout."""
    args = _tokenizer_parser().parse_args(argv)
    _check_tokenizer(args)
    # after the options are known to be right: these imports take seconds
    from training.evaluation.tokenizer_report import run_tokenizer_evaluation

    report = run_tokenizer_evaluation(args)
    _print(report["metrics"])
    note = (report["frechet"] or {}).get("note")
    if note:
        print(f"tokenloom {TOKENIZER_COMMAND}: note: {note}", file=sys.stderr)
    return 0


def evaluate_generator_command(argv: Sequence[str] | None = None) -> int:
    """`tokenloom evaluate generator`: report.json and contact_sheet.png in a folder, the headline numbers on stdout."""
    args = _generator_parser().parse_args(argv)
    _check_generator(args)
    # after the options are known to be right: these imports take seconds
    from training.evaluation.generator_report import headline, run_generator_evaluation

    report = run_generator_evaluation(args)
    if len(report["generated"]) == 1:
        _print(report["metrics"])
    else:
        _print({name: metric for name, metric in report["metrics"].items() if name not in headline(report["generated"][0])})
        for run in report["generated"]:
            _print(headline(run), f"guidance {run['sampling']['guidance_scale']:g}: ")
    notes = dict.fromkeys(run["frechet"]["note"] for run in report["generated"] if run.get("frechet"))
    for note in filter(None, notes):
        print(f"tokenloom {GENERATOR_COMMAND}: note: {note}", file=sys.stderr)
    return 0


def _print(metrics: dict[str, dict[str, Any]], before: str = "") -> None:
    for name, metric in metrics.items():
        print(f"{before}{name}: {_shown(metric['value'])} {metric['unit']}")


def _shown(value: float) -> str:
    """Four digits after the point, or four digits of a small number."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"


SUBCOMMANDS: dict[str, Any] = {"tokenizer": evaluate_tokenizer_command, "generator": evaluate_generator_command}
"""What can be measured -> a function of its arguments."""
