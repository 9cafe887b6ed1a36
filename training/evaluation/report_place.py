"""Where the reports of both evaluations may be written. Free of torch, so that a command can refuse
before it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenloom_common.errors import UserError
from tokenloom_common.outputs import check_output_file, check_output_folder
from training.evaluation.options import GENERATOR_COMMAND, TOKENIZER_COMMAND

REPORT_NAME = "report.json"
TOKENIZER_SHEET = "side_by_side.png"
GENERATOR_SHEET = "contact_sheet.png"
CURVE_NAME = "guidance.png"
TOKENIZER_FILES = (REPORT_NAME, TOKENIZER_SHEET)
GENERATOR_FILES = (REPORT_NAME, GENERATOR_SHEET, CURVE_NAME)
REPORT_BYTES = 1 << 20  # a report and its sheet of pictures, as a round number


def check_tokenizer_place(out: str | Path | None, save_reference: str | Path | None) -> None:
    """Raise UserError if --out or --save-reference cannot be written, or would lose something.

    out None: no report is written.
    """
    if out is not None:
        _check_out(out, TOKENIZER_FILES, TOKENIZER_COMMAND)
    if save_reference is None:
        return
    path = Path(save_reference)
    if str(save_reference) and path.suffix != ".npz":
        raise UserError(f"--save-reference {path}: give a name that ends in .npz")
    if out is not None and Path(out).resolve() in path.resolve().parents:
        raise UserError(f"--save-reference {path}: lies in --out, which is replaced as a whole; "
                        "give another folder")
    check_output_file("--save-reference", save_reference)


def check_generator_place(out: str | Path) -> None:
    """Raise UserError if --out cannot be written, or would lose something."""
    _check_out(out, GENERATOR_FILES, GENERATOR_COMMAND)


def _check_out(out: str | Path, names: Sequence[str], command: str) -> None:
    """Raise UserError if `out` cannot be written to, or holds files that are not this command's."""
    folder = check_output_folder("--out", out, names, REPORT_BYTES)
    # the other evaluation's report has this name too, and would be lost
    report = folder / REPORT_NAME
    if report.exists() and not is_report(report, command):
        raise UserError(f"{report}: exists and is not a report of `tokenloom {command}`; give "
                        "another folder")


def is_report(path: Path, command: str) -> bool:
    """Whether a file is an earlier report of this command."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["command"] == command)
    except (OSError, ValueError, TypeError, LookupError):  # unreadable, no JSON, no object, no key
        return False
