"""What a run folder tells: how far it came, what it reached, what went wrong. Reads files alone."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from training.runs.incidents import NAMED, read_incidents
from training.runs.metrics import read_metrics
from training.runs.retention import HIGHER_IS_BETTER, Measured

RECENT = 120.0  # seconds since the last line within which a run may still be running


@dataclass(frozen=True)
class RunFacts:
    """One run folder; numbers are None where the run did not say them."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    validation: dict[str, Any] | None
    latest_checkpoint: str | None

    @property
    def kind(self) -> str:
        """Which script made it, and the family of its model."""
        model = self.config.get("model") or {}
        script = "seq2seq" if "image_tokenizer" in self.config else "tokenizer" if "codebook" in self.config else "matcher"
        return " ".join(part for part in (script, str(model.get("kind") or "")) if part)

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
        """The mean of the last tenth of the lines."""
        values = [row["loss"] for row in self.rows if row.get("loss") is not None]
        last = values[-max(1, len(values) // 10):]
        return sum(last) / len(last) if last else None

    @property
    def validation_loss(self) -> float | None:
        """Measured on the held-out split at the end."""
        found = (self.validation or {}).get("loss")
        return None if found is None else float(found)

    @property
    def best(self) -> tuple[Measured, int] | None:
        """The best measurement of the held-out split while the run went on, and its step."""
        best: tuple[Measured, int] | None = None
        for row in self.rows:
            for name in HIGHER_IS_BETTER:
                if row.get(name) is not None:
                    measured = Measured(name, float(row[name]))
                    if measured.better_than(best[0] if best else None):
                        best = measured, int(row["step"])
        return best

    def median(self, name: str) -> float | None:
        """Of a number's lines: the first, which is slow, hardly counts."""
        values = sorted(row[name] for row in self.rows if row.get(name))
        return values[len(values) // 2] if values else None

    @property
    def memory_bytes(self) -> int | None:
        """The most that any line says."""
        return max((int(row["memory_bytes"]) for row in self.rows if row.get("memory_bytes")), default=None)

    @property
    def skipped(self) -> int:
        """Steps skipped because something was not finite."""
        return int(self._last("skipped_steps") or 0)

    def _last(self, name: str) -> Any:
        """Of the last line that has it."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    @property
    def status(self) -> str:
        """done, running (a line in the last two minutes), or stopped."""
        if (self.path / "model").is_dir() and self.steps >= self.total_steps:
            return "done"
        metrics = self.path / "metrics.jsonl"
        recent = metrics.is_file() and time.time() - metrics.stat().st_mtime < RECENT
        return "running" if recent else "stopped"

    @property
    def seconds(self) -> float:
        """Time spent training, over all starts of the run, as far as its log has it."""
        total, before = 0.0, 0.0
        for row in self.rows:
            elapsed = float(row.get("elapsed_s") or 0.0)
            if elapsed < before:  # it was started again
                total += before
            before = elapsed
        return total + before

    @property
    def incidents(self) -> list[str]:
        """What went wrong or was interrupted, in words."""
        found = [f"{self.skipped} steps were skipped because a loss or gradient was not finite"] if self.skipped else []
        for line in read_incidents(self.path):
            loss = f", loss {line['loss']:.4g} where {line['median']:.4g} was usual" if line["what"] == "spike" else ""
            found.append(f"step {line['step']:,}: {line['what']}{loss}; made of {', '.join(line['keys'][:NAMED])}"
                         + (f" and {len(line['keys']) - NAMED} more" if len(line["keys"]) > NAMED else ""))
        starts = sum(later.get("elapsed_s", 0) < earlier.get("elapsed_s", 0)
                     for earlier, later in zip(self.rows, self.rows[1:], strict=False))
        found += [f"started again {starts} times after a stop"] if starts else []
        dropped = self._last("dropped_items")
        found += [f"{int(dropped)} unusable pictures were left out"] if dropped else []
        found += [f"{path.name}: where a rank stood still" for path in sorted((self.path / "incidents").glob("*.txt"))]
        found += [f"{path.name}: an earlier run in this folder" for path in sorted(self.path.glob("before-*"))]
        return found


def read_run(path: Path) -> RunFacts:
    """The facts of a run folder. UserError for a folder that is none."""
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such folder")
    if not is_run(path):
        raise UserError(f"{path} is no run folder: it has no config.yaml with a run_dir; give what --run_dir was")
    return RunFacts(path, read_mapping(path / "config.yaml"), read_metrics(path / "metrics.jsonl"),
                    _json(path / "env.json") or {}, _json(path / "validation.json"),
                    (_json(path / "latest.json") or {}).get("checkpoint"))


def is_run(path: Path) -> bool:
    """Whether a folder is one that a training script wrote."""
    try:
        values = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "run_dir" in values and "train" in values


def find_runs(folder: Path) -> list[RunFacts]:
    """Every run folder at or below `folder`, by path, without what earlier runs left (before-N). UserError for none."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such folder")
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "before-")))
        if "config.yaml" in files and is_run(Path(root)):
            found.append(read_run(Path(root)))
            folders.clear()
    if not found:
        raise UserError(f"{folder}: no run folder at or below it (a folder that a training script was given as --run_dir)")
    return found


def _json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
