"""The command line of every benchmark: options in, tables and one JSON document out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import DTYPES
from tokenloom_common.errors import OneLineParser, RunFailedError, UserError
from tokenloom_common.files import write_json_atomic
from tokenloom_common.outputs import check_output_file, is_json_with

# ---- options

def command_parser(name: str, doc: str | None) -> OneLineParser:
    """Make the parser of `python -m benchmarks NAME`.

    doc: the module's docstring; its first paragraph becomes the description, the next two
    (examples, method) the end of the help.
    """
    first, *rest = (doc or "").split("\n\n")
    # no abbreviations: a later option could make one of today's ambiguous; raw: examples are lines
    return OneLineParser(prog=f"python -m benchmarks {name}", description=first,
                         epilog="\n\n".join(rest[:2]), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_options(parser: OneLineParser, repeats: str) -> None:
    """Add the options of every benchmark. repeats: the default number of rounds, for the help."""
    add_run_options(parser, repeats)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")


def add_run_options(parser: OneLineParser, repeats: str) -> None:
    """Add --threads, --repeats and --out, for a benchmark without a device."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, help=f"rounds of each timing ({repeats})")
    parser.add_argument("--out", "--json", dest="out",
                        help="also write the JSON document to this file")


def fill_in(args: argparse.Namespace, defaults: Mapping[str, object],
            least: Mapping[str, int]) -> None:
    """Give omitted options their defaults. UserError for a number below its least value."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, lowest in least.items():
        value = getattr(args, name)
        if value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {lowest}")


def whole_numbers(text: str, option: str) -> list[int]:
    """Parse `1,8` -> [1, 8], each once. UserError unless all are whole numbers of at least 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} '{text}': expected whole numbers of at least 1, separated by "
                        "commas, for example 1,8")
    return list(dict.fromkeys(int(part) for part in parts))  # a dict keeps the order, a set not


# ---- results

def run_benchmark(measure: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None],
                  out: str | None, peer: str) -> int:
    """Measure, show, write: every benchmark's main, once its options are parsed.

    out: the value of --out. RunFailedError if ours and the peer do not do the same work.
    """
    # before the measuring, which takes long
    path = check_output(out)
    document = measure()
    show(document)
    # the document is written first: it says what differed
    finish(document, path)
    require_same_work(document, peer)
    return 0


def say(benchmark: str, text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"benchmarks {benchmark}: {text}", file=sys.stderr, flush=True)


def check_output(name: str | None) -> Path | None:
    """Return the path of --out.

    UserError, before anything is measured, if it cannot be written or is a file of another kind.
    """
    if name is None:
        return None
    return check_output_file("--out", name, lambda path: is_json_with(path, "benchmark"))


def finish(document: dict[str, Any], out: Path | None) -> None:
    """Write the document to --out and, on one line, as the last line of stdout."""
    if out is not None:
        write_json_atomic(out, document)
    print(json.dumps(document), flush=True)  # one line, so that `tail -n 1` gives the document


def require_same_work(document: dict[str, Any], peer: str) -> None:
    """RunFailedError with the first check of the document that failed, if one did."""
    if document["ok"]:
        return
    failed = next(row for row in document["verification"] if not row["ok"])
    facts = ", ".join(f"{key} {value}" for key, value in failed.items() if key != "ok")
    raise RunFailedError(f"ours and {peer} do not do the same work, so nothing was timed: {facts}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows with the same keys as a table for people; None is a dash."""
    if not rows:
        return ""
    cells = [list(rows[0])]
    cells += [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    lines = []
    for line in cells:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
