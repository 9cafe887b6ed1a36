"""`tokenloom data emoji|shapes|import|check|concepts`: make, check or list a captioned data set."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, OneLineParser, UserError
from tokenloom_common.files import write_json_atomic
from tokenloom_common.outputs import check_output_file, is_json_with
from tokenloom_common.text_files import read_text_file
from training.commands.next_command import after_images, after_tokens, in_one_command
from training.commands.reading_options import add_reading_options, given_reading

EXAMPLES = """examples:
  tokenloom data emoji --out data/emoji --size 64
  tokenloom data emoji --out data/emoji32 --size 32 --num_concepts 400 --styles noto,twemoji
  tokenloom data shapes --out data/shapes --num_scenes 5000
  tokenloom data import coco downloads/coco --out data/coco
  tokenloom data import flickr30k downloads/flickr30k --out data/flickr30k
  tokenloom data check data/emoji --split train --json report.json
  tokenloom data check photos --caption-ending .tags
  tokenloom data check runs/tokens
  tokenloom data concepts data/emoji --out demo/model/concepts.json
"""

IMPORT_KINDS = {
    "coco": "COCO 2014 or 2017 (captions_*.json), or Karpathy's splits (dataset_coco.json)",
    "flickr30k": "results.csv, results_*.token, captions.txt, flickr_annotations_30k.csv or "
                 "dataset_flickr30k.json",
    "flickr8k": "captions.txt, Flickr8k.token.txt or dataset_flickr8k.json",
    "diffusiondb": "2M or large: part-*/part-*.json, metadata.parquet, or both",
    "table": "captions.csv, .tsv or .txt with a picture's name and a caption in each line",
}
SHOWN_ANNOTATIONS = 3


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
    # argparse's own metavar would be {emoji,shapes,import,check,concepts}
    commands = parser.add_subparsers(required=True, metavar="emoji|shapes|import|check|concepts")
    _add_emoji(commands)
    _add_shapes(commands)
    _add_import(commands)
    _add_check(commands)
    _add_concepts(commands)
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


def _add_import(commands: Any) -> None:
    parser = _command(commands, "import", _import,
                      "published data sets into parquet shards, with their pictures as they are")
    parser.add_argument("kind", metavar="KIND", help="one of the table below")
    parser.add_argument("source", metavar="SRC", nargs="?", type=Path,
                        help="the folder that it was unpacked to")
    parser.add_argument("--out", type=_folder, required=True,
                        help="folder to build (new, empty, or an earlier import)")
    parser.add_argument("--annotations", type=Path, nargs="+", metavar="FILE",
                        help="files of captions (default: found below SRC by their names)")
    parser.add_argument("--images", type=Path, metavar="DIR",
                        help="the folder that the pictures are below (default: SRC)")
    parser.add_argument("--encoding", metavar="NAME", help="of annotations without a byte order "
                        "mark, such as cp1252 (default: UTF-8)")
    parser.add_argument("--follow-links", "--follow_links", action="store_true",
                        help="take pictures that links lead to out of SRC")
    table = "\n".join(f"  {name:<12} {about}" for name, about in IMPORT_KINDS.items())
    parser.epilog = f"kinds:\n{table}\n\n{parser.epilog}"


def _add_check(commands: Any) -> None:
    parser = _command(commands, "check", _check, "how data is read, counts, sizes, captions, "
                      "duplicates, every unusable item, and what to run next; token shards, too")
    parser.add_argument("path", help="folder, parquet file, tar shards such as "
                        "'data/{000..012}.tar', hub id; or token shards")
    parser.add_argument("--split", "--data.split", help="default: train, or the only one")
    parser.add_argument("--json", metavar="FILE",
                        help="also write the whole report there")
    add_reading_options(parser, streaming=True)


def _add_concepts(commands: Any) -> None:
    parser = _command(commands, "concepts", _concepts, "the concepts, styles and words of a data "
                      "set, as concepts.json of a model trained on it (generate --expand)")
    parser.add_argument("path", help="the data set: folder, parquet file, tar shards or hub id")
    parser.add_argument("--out", metavar="FILE", required=True,
                        help="file to write, such as MODEL/concepts.json")
    parser.add_argument("--split", "--data.split", help="default: train, or the only one")
    parser.add_argument("--text-encoder", metavar="DIR", help="folder or hub id of a sentence "
                        "encoder of BERT's kind, such as MiniLM: also find, for every word that it "
                        "knows, the nearest word of the data")
    parser.add_argument("--other-words", metavar="FILE", help="with --text-encoder: further words, "
                        "one a line, such as /usr/share/dict/words")
    add_reading_options(parser)


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


def _import(arguments: argparse.Namespace) -> int:
    from training.data.builders.imports.importing import import_data

    if arguments.source is None:
        raise UserError(f"{arguments.kind}: give the kind of the data and its folder, as in "
                        f"`tokenloom data import KIND SRC --out DIR` ({', '.join(IMPORT_KINDS)})")
    report = import_data(arguments.kind, arguments.source, arguments.out,
                         annotations=arguments.annotations or (), images=arguments.images,
                         encoding=arguments.encoding, follow_links=arguments.follow_links)
    if report["missing"]:
        total = report["missing"] + sum(report["pairs"].values())
        names = ", ".join(report["missing_such_as"])
        print(f"tokenloom data import: warning: {report['missing']:,} of {total:,} pictures are "
              f"not below {report['images_below']} (such as {names})", file=sys.stderr)
    _print_build(arguments.out, report)
    more = " and others" if len(report["annotations"]) > SHOWN_ANNOTATIONS else ""
    print(f"captions of {', '.join(report['annotations'][:SHOWN_ANNOTATIONS])}{more}")
    print(f"next: tokenloom data check {shlex.quote(str(arguments.out))}")
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
    if report["next_in_one"] is None:
        print(f"next: {report['next']}")
    else:
        print(f"next: {report['next_in_one']}")
        print(f"or step by step: {report['next']}")
    if out:
        write_json_atomic(Path(out), report)
    return 0 if report["usable"] and not report.get("damaged") else 1


def _checked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check a data set or a folder of token shards; return the report."""
    from training.data.check import check_data
    from training.data.tokens.check import check_tokens, is_token_folder

    reading = given_reading(arguments)
    if is_token_folder(arguments.path):
        if reading or arguments.streaming:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in reading) or "--streaming"
            raise UserError(f"{arguments.path}: token shards, which are read in one way; leave "
                            f"{names} out")
        report = check_tokens(arguments.path, arguments.split)
        return {**report, "next": after_tokens(report), "next_in_one": None}

    # each row is read once, in order
    report = check_data(arguments.path, split=arguments.split, **reading,
                        streamed_rows=1 if arguments.streaming else 0)
    given = {**reading, **({"streaming": True} if arguments.streaming else {})}
    return {**report, "next": after_images(report, given),
            "next_in_one": in_one_command(report, given)}


def _concepts(arguments: argparse.Namespace) -> int:
    out = check_output_file("--out", arguments.out, lambda path: is_json_with(path, "concepts"))
    other_words = []
    if arguments.other_words is not None:
        if arguments.text_encoder is None:
            raise UserError("--other-words belongs to --text-encoder, which finds what they mean")
        name = f"--other-words {arguments.other_words}"
        other_words = read_text_file(Path(arguments.other_words), name).split()
    from training.data.concepts import build_concepts

    found = build_concepts(arguments.path, arguments.split, arguments.text_encoder, other_words,
                           **given_reading(arguments))
    found.write(out)
    synonyms = "" if found.synonyms is None else f", {len(found.synonyms):,} synonyms"
    print(f"{out}: {len(found.concepts):,} concepts, {len(found.styles)} styles, "
          f"{len(found.words):,} words{synonyms}, {out.stat().st_size:,} bytes")
    return 0
