"""The log of a run: metrics.jsonl (always), the console, and the writers of writers.py."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_text_atomic
from tokenloom_common.progress import progress
from training.loop.writers import LogWriter
from training.runs.metrics import read_metrics, sample_path

log = logging.getLogger(__name__)


def setup_console(is_first: bool) -> None:
    """Log to stderr; the first process all, the others errors alone. Called from main() only."""
    # torch.distributed deprecates functions that DeepSpeed 0.19 still calls; a user can do nothing
    # about it
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    level = logging.INFO if is_first else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("training", "inference", "seq2seq", "tokenizer_image"):
        logging.getLogger(name).setLevel(level)


class RunLog:
    """metrics.jsonl, one object a line, a progress bar with ETA, and writers.

    Silent on all but the first process.
    """

    def __init__(self, run_dir: Path, is_first: bool, what: str, total_steps: int, first_step: int,
                 writers: Mapping[str, LogWriter] | None = None) -> None:
        """writers: by the key of the `log` section that names them."""
        self.is_first = is_first
        self.run_dir = run_dir
        self.path = run_dir / "metrics.jsonl"
        self._writers = dict(writers or {})
        self._bar = progress(None, what, total=total_steps, initial=first_step, unit="step",
                             quiet=not is_first)
        self._last: dict[str, Any] = {}  # newest value of every number, for the bar
        self._file = None
        if is_first:
            _keep_lines_before(self.path, first_step)  # before it is opened to append
            self._file = self.path.open("a", encoding="utf-8")
        self._started = time.perf_counter()

    def step_done(self) -> None:
        """Advance the progress bar by one optimizer step."""
        self._bar.update(1)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Write one line; non-finite numbers become null so that every line is JSON."""
        if self._file is None:
            return
        row = {"step": step, **values, "elapsed_s": round(time.perf_counter() - self._started, 3)}
        # JSON has no NaN; null keeps the line readable for every parser
        row = {name: None if _is_not_finite(value) else value for name, value in row.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # a killed run keeps every line

        finite = {name: value for name, value in values.items() if row[name] is not None}
        self._tell(lambda writer: writer.metrics(step, finite))
        self._last |= values
        self._bar.set_postfix_str(in_short(self._last), refresh=False)

    def sampled(self, step: int) -> None:
        """Tell the writers of the sample grid of this step, if there is one."""
        path = sample_path(self.run_dir, step)
        if self._file is not None and path.is_file():
            self._tell(lambda writer: writer.image(step, path.parent.name, path))

    def _tell(self, action: Callable[[LogWriter], None]) -> None:
        for name, writer in list(self._writers.items()):  # a copy: one that fails is deleted
            try:
                action(writer)
            except Exception as error:  # any package's own: a place for curves must not end a run
                log.warning("log.%s failed and is left out from here on (%s: %s); metrics.jsonl "
                            "goes on", name, type(error).__name__, error)
                del self._writers[name]

    def close(self) -> None:
        """Close bar, file and writers."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        self._tell(lambda writer: writer.close())


SHOWN: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3g}".format,
    "validation_loss": "held-out {:.4g}".format,
    "validation_psnr": "held-out {:.2f} dB".format,
    "validation_top1": "held-out {:.1%} found".format,
    "lr": "lr {:.3g}".format,
    "tokens_per_s": "{:,.0f} tokens/s".format,
    "samples_per_s": "{:,.3g} samples/s".format,
    "mfu": "MFU {:.1%}".format,
    "data_wait": "data wait {:.0%}".format,
    "memory_bytes": lambda value: f"{value / (1 << 30):.2f} GiB",
    "codebook_usage": "codebook {:.0%}".format}
"""Number of metrics.jsonl -> how the progress bar shows it, in this order."""


def in_short(values: Mapping[str, float]) -> str:
    """Format the values that are in SHOWN: `loss 4.31, lr 0.0003, 12,345 tokens/s, MFU 41.0%`."""
    shown = {name: show(values[name]) for name, show in SHOWN.items() if name in values}
    if "tokens_per_s" in shown:  # says the same in a unit that compares between batch sizes
        shown.pop("samples_per_s", None)
    return ", ".join(shown.values())


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep_lines_before(path: Path, first_step: int) -> None:
    """Drop lines of steps that a resumed run is about to repeat."""
    kept = []
    if first_step:  # a fresh run begins with an empty file
        kept = [row for row in read_metrics(path) if row.get("step", 0) <= first_step]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
