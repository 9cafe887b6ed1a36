"""The command `report`: one page about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenloom_common.errors import OneLineParser
from tokenloom_common.files import write_text_atomic
from tokenloom_common.outputs import check_output_file


def report(argv: Sequence[str] | None = None) -> int:
    """`tokenloom report RUN`: one self-contained HTML page."""
    parser = OneLineParser(prog="tokenloom report",
                           description="Write one self-contained HTML page about a run.",
                           epilog="examples:\n  tokenloom report runs/seq2seq\n"
                                  "  tokenloom report runs/seq2seq --out seq2seq.html",
                           formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", help="the page to write (default: RUN/report.html); "
                        "replaces an older page alone")
    args = parser.parse_args(argv)

    out = args.run / "report.html" if args.out is None else args.out
    out = check_output_file("--out", out, _is_page)
    # not above: these imports take seconds
    from training.runs.facts import read_run
    from training.runs.page import page

    write_text_atomic(out, page(read_run(args.run)))
    print(out)
    return 0


def _is_page(path: Path) -> bool:
    """Whether a file is an HTML page, as an earlier report is."""
    with path.open("rb") as file:
        start = file.read(100)
    return start.lstrip().lower().startswith(b"<!doctype html")
