"""Read metrics.jsonl and sample grids of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def sample_path(run_dir: Path, step: int) -> Path:
    """Path of the sample grid of a step."""
    return run_dir / "samples" / f"step-{step:08d}.png"


def sample_grids(run_dir: Path) -> dict[int, Path]:
    """Return the sample grids that exist, by step, in the order of the steps."""
    paths = sorted((run_dir / "samples").glob("step-*.png"))
    steps = {path: path.stem.removeprefix("step-") for path in paths}
    # a user may have put a copy of one beside it
    return {int(step): path for path, step in steps.items() if step.isdigit()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, none where it is missing.

    A half-written last line, of a run that was killed, is left out.
    """
    rows = []
    if path.is_file():
        # at line ends alone: a key or a caption may hold other separators
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
