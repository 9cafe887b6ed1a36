"""What a run says: metrics.jsonl (always), the console, and curves as a picture."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_text_atomic
from tokenloom_common.progress import progress


def setup_console(is_first: bool) -> None:
    """Warnings and up to stderr on the first process, errors on the others. Called from main() only."""
    # torch.distributed deprecates functions that DeepSpeed 0.19 still calls; a user can do nothing about it
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    level = logging.INFO if is_first else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("training", "inference", "seq2seq", "tokenizer_image"):
        logging.getLogger(name).setLevel(level)


class RunLog:
    """metrics.jsonl, one object a line, and a progress bar with ETA; silent on all but the first process."""

    def __init__(self, run_dir: Path, is_first: bool, what: str, total_steps: int, first_step: int) -> None:
        self.is_first = is_first
        self.path = run_dir / "metrics.jsonl"
        self._bar = progress(None, what, total=total_steps, initial=first_step, unit="step", quiet=not is_first)
        self._file = None
        if is_first:
            _keep_lines_before(self.path, first_step)
            self._file = self.path.open("a", encoding="utf-8")
        self._started = time.perf_counter()

    def step_done(self) -> None:
        """One optimizer step further."""
        self._bar.update(1)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; non-finite numbers become null so that every line is JSON."""
        if self._file is None:
            return
        row = {"step": step, **values, "elapsed_s": round(time.perf_counter() - self._started, 3)}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        names = ("loss", "lr", "samples_per_s", "codebook_usage")
        shown: dict[str, object] = {name: f"{values[name]:.3g}" for name in names if name in values}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Finish bar and file."""
        self._bar.close()
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written last line (a killed run) is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def _keep_lines_before(path: Path, first_step: int) -> None:
    """Drop lines of steps that a resumed run is about to repeat."""
    kept = [row for row in read_metrics(path) if row.get("step", 0) <= first_step] if first_step else []
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
