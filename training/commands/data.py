"""`tokenloom data emoji|shapes|check`: build a captioned data set, or check one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, OneLineParser, UserError
from tokenloom_common.files import write_json_atomic
from tokenloom_common.outputs import check_output_file, is_json_with

EXAMPLES = """examples:
  tokenloom data emoji --out data/emoji --size 64
  tokenloom data emoji --out data/emoji32 --size 32 --num_concepts 400 --styles noto,twemoji
  tokenloom data shapes --out data/shapes --num_scenes 5000
  tokenloom data check data/emoji --split train --json report.json
  tokenloom data check runs/tokens
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0, or 1 where `check` finds nothing usable, or damage.

    Raises UserError and its kin.
    """
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


# ---- options ----

def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tokenloom data", description=__doc__, epilog=EXAMPLES,
                           allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse's own metavar would be {emoji,shapes,check}
    commands = parser.add_subparsers(required=True, metavar="emoji|shapes|check")
    _add_emoji(commands)
    _add_shapes(commands)
    _add_check(commands)
    return parser


def _add_emoji(commands: Any) -> None:
    parser = _command(commands, "emoji", _emoji,
                      "real emoji pictures in several drawing styles, with captions")
    parser.add_argument("--out", type=_folder, required=True,
                        help="folder to build (new, empty, or an earlier build)")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default 64)")
    parser.add_argument("--styles", nargs="+", metavar="STYLE", help="drawing styles, with commas "
                        "or spaces (default: all that are not share-alike)")
    parser.add_argument("--source", default="auto", metavar="auto|npm|pip",
                        help="where the pictures come from (default auto: npm, else pip with the "
                        "twemoji style only)")
    # both spellings: configs have underscores, other commands have dashes
    parser.add_argument("--num_concepts", "--num-concepts", type=int, metavar="N",
                        help="only N distinctive emoji, the same ones every time (default: all)")
    parser.add_argument("--with_tones", "--with-tones", action="store_true",
                        help="add one other skin tone to each emoji that has them")
    parser.add_argument("--seed", type=int, default=0, help="decides what is held out (default 0)")


def _add_shapes(commands: Any) -> None:
    parser = _command(commands, "shapes", _shapes,
                      "synthetic scenes whose captions are exactly true")
    parser.add_argument("--out", type=_folder, required=True,
                        help="folder to build (new, empty, or an earlier build)")
    parser.add_argument("--size", type=int, default=32, help="pixels on a side (default 32)")
    parser.add_argument("--num_scenes", "--num-scenes", type=int, default=2000, metavar="N",
                        help="scenes to draw (default 2000)")
    parser.add_argument("--max_objects", "--max-objects", type=int, default=2, metavar="N",
                        help="most shapes in a scene, 1 to 4 (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="decides the scenes (default 0)")


def _add_check(commands: Any) -> None:
    parser = _command(commands, "check", _check, "counts, sizes, captions, duplicates, every "
                      "unusable item; hashes of token shards")
    parser.add_argument("path", help="folder, parquet file, tar shards such as "
                        "'data/{000..012}.tar', hub id; or token shards")
    parser.add_argument("--split", help="default: train, or the only one")
    parser.add_argument("--caption_column", "--caption-column",
                        help="default: text, captions, caption or prompt")
    parser.add_argument("--image_column", "--image-column", help="default: image")
    parser.add_argument("--streaming", action="store_true", help="read parquet and tar shards "
                        "where they lie, without a copy in the cache of `datasets`")
    parser.add_argument("--json", metavar="FILE",
                        help="also write the whole report there")


def _folder(text: str) -> Path:
    if not text:  # Path("") would be the working directory
        raise argparse.ArgumentTypeError("is empty; give a folder")
    return Path(text)


def _command(commands: Any, name: str, run: Any, text: str) -> OneLineParser:
    """Add a subcommand, with the lines of EXAMPLES that show it."""
    own_lines = [line for line in EXAMPLES.splitlines() if f"data {name}" in line]
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                 epilog="\n".join(["examples:", *own_lines]), allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


# ---- subcommands ----
# Each imports what it needs itself: `tokenloom data --help` takes no second, and needs no torch.

def _emoji(arguments: argparse.Namespace) -> int:
    from training.data.builders.emoji import build_emoji

    styles = None
    if arguments.styles:
        words = ",".join(arguments.styles).split(",")  # "a,b c" and "a b c" alike
        styles = [word for word in words if word]
    report = build_emoji(arguments.out, arguments.size, styles, arguments.source,
                         arguments.num_concepts, arguments.with_tones, arguments.seed)
    _print_build(arguments.out, report)
    return 0


def _shapes(arguments: argparse.Namespace) -> int:
    from training.data.builders.shapes import build_shapes

    report = build_shapes(arguments.out, arguments.size, arguments.num_scenes, arguments.seed,
                          arguments.max_objects)
    _print_build(arguments.out, report)
    return 0


def _print_build(out: Path, report: dict[str, Any]) -> None:
    done = f"built in {report['seconds']:g} s"
    if report["reused"]:  # `seconds` is then that of the earlier build
        done = "already built with these arguments"
    splits = _counts(report["pairs"])
    dropped = _counts(report.get("dropped", {}))  # by reason; shapes drop nothing
    print(f"{out}: {done}: {splits}" + (f" (dropped {dropped})" if dropped else ""))


def _counts(count_of: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in count_of.items())


def _check(arguments: argparse.Namespace) -> int:
    # before the imports, which take seconds, and the check, which may take minutes
    out = arguments.json
    if out is not None:
        check_output_file("--json", out, lambda path: is_json_with(path, "usable"))
    from training.data.check import format_report
    from training.data.tokens.check import format_token_report

    try:
        report = _checked(arguments)
    except DataError as error:  # nothing usable is this command's finding, not its failure to work
        print(error)
        return 1

    print(format_token_report(report) if "damaged" in report else format_report(report))
    if out:
        write_json_atomic(Path(out), report)
    return 0 if report["usable"] and not report.get("damaged") else 1


def _checked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check a data set or a folder of token shards; return the report."""
    from training.data.check import check_data
    from training.data.tokens.check import check_tokens, is_token_folder

    if not is_token_folder(arguments.path):
        return check_data(arguments.path, split=arguments.split,
                          caption_column=arguments.caption_column,
                          # each row is read once, in order
                          image_column=arguments.image_column,
                          streamed_rows=1 if arguments.streaming else 0)
    if arguments.caption_column or arguments.image_column or arguments.streaming:
        raise UserError(f"{arguments.path}: token shards, whose columns have fixed names; leave "
                        "--caption-column, --image-column and --streaming out")
    return check_tokens(arguments.path, arguments.split)
