"""Read the facts of a run folder, from files alone: progress, numbers, incidents."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from training.runs.incidents import first_keys, read_incidents
from training.runs.metrics import read_metrics
from training.runs.retention import HIGHER_IS_BETTER, Measured

RECENT = 120.0  # seconds since the last line within which a run may still be running


@dataclass(frozen=True)
class RunFacts:
    """One run folder; numbers are None where the run did not log them."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    validation: dict[str, Any] | None
    latest_checkpoint: str | None

    @property
    def kind(self) -> str:
        """The script that made it, and the family of its model."""
        # config.yaml does not name its script, so by the keys that only one of them has
        if "image_tokenizer" in self.config:
            script = "seq2seq"
        elif "codebook" in self.config:
            script = "tokenizer"
        else:
            script = "matcher"
        family = (self.config.get("model") or {}).get("kind")
        return f"{script} {family}" if family else script

    @property
    def steps(self) -> int:
        """Steps that are done, by the log."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total_steps(self) -> int:
        """Steps that were asked for."""
        return int((self.config.get("train") or {}).get("steps", 0))

    @property
    def loss(self) -> float | None:
        """Mean of the last tenth of the lines."""
        losses = [row["loss"] for row in self.rows if row.get("loss") is not None]
        # one line is noisy: it is of a few batches
        last = losses[-max(1, len(losses) // 10):]
        return sum(last) / len(last) if last else None

    @property
    def validation_loss(self) -> float | None:
        """Loss on the held-out split at the end."""
        loss = (self.validation or {}).get("loss")
        return None if loss is None else float(loss)

    @property
    def best(self) -> tuple[Measured, int] | None:
        """The best measurement of the held-out split during the run, and its step."""
        best: Measured | None = None
        best_step = 0
        for row in self.rows:
            for name in HIGHER_IS_BETTER:
                if row.get(name) is None:
                    continue
                measured = Measured(name, float(row[name]))
                if measured.better_than(best):
                    best, best_step = measured, int(row["step"])
        return None if best is None else (best, best_step)

    def median(self, name: str) -> float | None:
        """Median of a number over its lines, in which the slow first one hardly counts."""
        # a line without it, or with 0 or null, says nothing of the speed
        values = sorted(row[name] for row in self.rows if row.get(name))
        return values[len(values) // 2] if values else None

    @property
    def memory_bytes(self) -> int | None:
        """The most of any line."""
        used = (int(row["memory_bytes"]) for row in self.rows if row.get("memory_bytes"))
        return max(used, default=None)

    @property
    def skipped(self) -> int:
        """Steps skipped because something was not finite."""
        return int(self._last("skipped_steps") or 0)

    def _last(self, name: str) -> Any:
        """Return a number of the last line that has it."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    @property
    def status(self) -> str:
        """done, running (a line in the last two minutes), or stopped."""
        if (self.path / "model").is_dir() and self.steps >= self.total_steps:
            return "done"
        metrics = self.path / "metrics.jsonl"
        if not metrics.is_file():
            return "stopped"
        # by the age of the log, which also a reader on another machine sees
        age = time.time() - metrics.stat().st_mtime
        return "running" if age < RECENT else "stopped"

    @property
    def seconds(self) -> float:
        """Time spent training, over all starts of the run, as far as its log has it."""
        total, before = 0.0, 0.0
        for row in self.rows:
            elapsed = float(row.get("elapsed_s") or 0.0)
            if elapsed < before:  # the clock began again with a new start
                total += before
            before = elapsed
        return total + before

    @property
    def restarts(self) -> int:
        """How often the run was started again, seen by a clock that went back between two lines."""
        seconds = [row.get("elapsed_s", 0) for row in self.rows]
        return sum(later < earlier for earlier, later in itertools.pairwise(seconds))

    @property
    def incidents(self) -> list[str]:
        """Everything that went wrong or was interrupted, a sentence each."""
        found = []
        if self.skipped:
            found.append(f"{self.skipped} steps were skipped because a loss or gradient was not "
                         "finite")
        found += [_incident(line) for line in read_incidents(self.path)]
        if self.restarts:
            found.append(f"started again {self.restarts} times after a stop")
        dropped = self._last("dropped_items")
        if dropped:
            found.append(f"{int(dropped)} unusable pictures were left out")

        # the watchdog writes the stacks of a stalled rank into a .txt
        stalls = sorted((self.path / "incidents").glob("*.txt"))
        found += [f"{path.name}: where a rank stood still" for path in stalls]
        earlier_runs = sorted(self.path.glob("before-*"))
        found += [f"{path.name}: an earlier run in this folder" for path in earlier_runs]
        return found


def _incident(line: dict[str, Any]) -> str:
    loss = ""
    if line["what"] == "spike":
        loss = f", loss {line['loss']:.4g} where {line['median']:.4g} was usual"
    return f"step {line['step']:,}: {line['what']}{loss}; made of {first_keys(line['keys'])}"


def read_run(path: Path) -> RunFacts:
    """Read the facts of a run folder. UserError for a folder that is none."""
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such folder")
    if not is_run(path):
        raise UserError(f"{path} is no run folder: it has no config.yaml with a run_dir; give "
                        "what --run_dir was")
    latest = _read_object(path / "latest.json") or {}  # none before the first checkpoint
    return RunFacts(
        path, read_mapping(path / "config.yaml"), read_metrics(path / "metrics.jsonl"),
        environment=_read_object(path / "env.json") or {},
        validation=_read_object(path / "validation.json"),
        latest_checkpoint=latest.get("checkpoint"))


def is_run(path: Path) -> bool:
    """Whether a training script wrote this folder."""
    try:
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "run_dir" in values and "train" in values


def find_runs(folder: Path) -> list[RunFacts]:
    """Read every run folder at or below `folder`, by path. UserError for none.

    An earlier run's before-N is left out.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    found = []
    for root, folders, files in os.walk(folder):
        # in place, which keeps os.walk out of what is left out here
        folders[:] = sorted(name for name in folders if not name.startswith((".", "before-")))
        if "config.yaml" in files and is_run(Path(root)):
            found.append(read_run(Path(root)))
            folders.clear()  # a run's own folders hold no further runs
    if not found:
        raise UserError(f"{folder}: no run folder at or below it (a folder that a training script "
                        "was given as --run_dir)")
    return found


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no such file, or a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
