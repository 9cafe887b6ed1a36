"""The command `runs`: a table of run folders."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import OneLineParser
from training.runs.facts import RunFacts, find_runs
from training.runs.page import duration, gibibytes, percent, whole

# also the keys of a line in --json
COLUMNS = ("run", "kind", "status", "steps", "loss", "held-out", "best", "samples/s", "tokens/s",
           "MFU", "memory", "skipped", "time")
OPTIONAL_COLUMNS = ("best", "tokens/s", "MFU", "memory")
"""Columns that are left out of the table where no run has them."""
UNITS: dict[str, Callable[[Any], str]] = {
    "tokens/s": whole,
    "MFU": percent,
    "memory": gibibytes,
    "time": duration,
}


def runs(argv: Sequence[str] | None = None) -> int:
    """`tokenloom runs DIR`: every run at or below a folder, one line per run."""
    parser = OneLineParser(prog="tokenloom runs",
                           description="Compare the runs at or below a folder.",
                           epilog="examples:\n  tokenloom runs runs\n"
                                  "  tokenloom runs runs --sort held-out --json",
                           formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path,
                        help="a folder with run folders in it, or one run folder")
    parser.add_argument("--sort", choices=COLUMNS, default="run",
                        help="column to sort by (default run: its path)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args(argv)

    lines = [_line(run, args.folder) for run in find_runs(args.folder)]
    lines.sort(key=lambda line: _sort_key(line[args.sort]))
    if args.json:
        print(json.dumps({"folder": str(args.folder), "runs": lines}))
    else:
        _print_table(lines)
    return 0


def _print_table(lines: list[dict[str, Any]]) -> None:
    columns = []
    for name in COLUMNS:
        if name not in OPTIONAL_COLUMNS or any(line[name] is not None for line in lines):
            columns.append(name)
    rows = [columns]  # of text; the first is the head
    for line in lines:
        rows.append([_shown(name, line) for name in columns])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        padded = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        print("  ".join(padded).rstrip())


def _line(run: RunFacts, folder: Path) -> dict[str, Any]:
    if run.path == folder:
        name = run.path.resolve().name  # `.` would say nothing
    else:
        name = str(run.path.relative_to(folder))
    best = best_name = best_step = None  # not every run measures a held-out split as it goes
    if run.best:
        metric, best_step = run.best
        best, best_name = metric.value, metric.name
    return {
        "run": name,
        "kind": run.kind,
        "status": run.status,
        "steps": run.steps,
        "of": run.total_steps,
        "loss": run.loss,
        "held-out": run.validation_loss,
        "best": best,
        "best of": best_name,
        "best step": best_step,
        # medians, in which the slow first line hardly counts
        "samples/s": run.median("samples_per_s"),
        "tokens/s": run.median("tokens_per_s"),
        "MFU": run.median("mfu"),
        "memory": run.memory_bytes,
        "skipped": run.skipped,
        "time": round(run.seconds, 1),
    }


def _sort_key(value: Any) -> tuple[bool, Any]:
    """Sort unknown values last; they cannot be compared with others."""
    return value is None, 0 if value is None else value


def _shown(name: str, line: dict[str, Any]) -> str:
    """Format a cell of the table, which --json has as a number."""
    value = line[name]
    if name == "steps":
        return f"{value:,}/{line['of']:,}"
    if name == "best" and value is not None:
        return f"{value:.4g} @ {line['best step']:,}"
    if name in UNITS:  # these show None too
        return UNITS[name](value)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
