"""The commands `runs` (a table of run folders) and `report` (one page about a run)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import OneLineParser, UserError
from tokenloom_common.files import write_text_atomic
from training.runs.facts import RunFacts, find_runs, read_run
from training.runs.page import duration, gibibytes, page, percent, whole

COLUMNS = ("run", "kind", "status", "steps", "loss", "held-out", "best", "samples/s", "tokens/s", "MFU", "memory", "skipped",
           "time")
SOMETIMES = ("best", "tokens/s", "MFU", "memory")
"""Columns that are left out of the table where no run has them."""
UNITS: dict[str, Callable[[Any], str]] = {"tokens/s": whole, "MFU": percent, "memory": gibibytes, "time": duration}


def runs(argv: Sequence[str] | None = None) -> int:
    """`tokenloom runs DIR`: every run at or below a folder, a line each."""
    parser = OneLineParser(prog="tokenloom runs", description="Compare the runs at or below a folder.",
                           epilog="examples:\n  tokenloom runs runs\n  tokenloom runs runs --sort held-out --json",
                           formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with run folders in it, or one run folder")
    parser.add_argument("--sort", choices=COLUMNS, default="run", help="column to sort by (default run: its path)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args(argv)
    found = sorted((_line(run, args.folder) for run in find_runs(args.folder)), key=lambda line: _key(line[args.sort]))
    if args.json:
        print(json.dumps({"folder": str(args.folder), "runs": found}))
        return 0
    columns = [name for name in COLUMNS if name not in SOMETIMES or any(line[name] is not None for line in found)]
    rows = [columns, *([_shown(name, line) for name in columns] for line in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _line(run: RunFacts, folder: Path) -> dict[str, Any]:
    name = str(run.path.relative_to(folder)) if run.path != folder else run.path.resolve().name
    return {"run": name, "kind": run.kind, "status": run.status, "steps": run.steps, "of": run.total_steps, "loss": run.loss,
            "held-out": run.validation_loss, "best": run.best[0].value if run.best else None,
            "best of": run.best[0].name if run.best else None, "best step": run.best[1] if run.best else None,
            "samples/s": run.median("samples_per_s"), "tokens/s": run.median("tokens_per_s"), "MFU": run.median("mfu"),
            "memory": run.memory_bytes, "skipped": run.skipped, "time": round(run.seconds, 1)}


def _key(value: Any) -> tuple[bool, Any]:
    return value is None, value if value is not None else 0  # what is not known comes last


def _shown(name: str, line: dict[str, Any]) -> str:
    value = line[name]
    if name == "steps":
        return f"{value:,}/{line['of']:,}"
    if name == "best" and value is not None:
        return f"{value:.4g} @ {line['best step']:,}"
    if name in UNITS:
        return UNITS[name](value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def report(argv: Sequence[str] | None = None) -> int:
    """`tokenloom report RUN`: one self-contained HTML page."""
    parser = OneLineParser(prog="tokenloom report", description="Write one HTML page about a run, with everything in it.",
                           epilog="examples:\n  tokenloom report runs/seq2seq\n"
                                  "  tokenloom report runs/seq2seq --out seq2seq.html",
                           formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/report.html)")
    args = parser.parse_args(argv)
    run = read_run(args.run)
    out = args.out or args.run / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: {out.parent} is no folder; make it first")
    write_text_atomic(out, page(run))
    print(out)
    return 0
