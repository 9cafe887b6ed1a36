"""Read metrics.jsonl and sample grids of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def sample_path(run_dir: Path, step: int) -> Path:
    """Where the sample grid of a step lies."""
    return run_dir / "samples" / f"step-{step:08d}.png"


def sample_grids(run_dir: Path) -> dict[int, Path]:
    """The sample grids that there are, by step."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted((run_dir / "samples").glob("step-*.png"))}


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
