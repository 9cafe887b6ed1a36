"""The time that a job has taken, over all of its starts, in all and by stage."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_json_atomic

SAVE_SECONDS = 5.0  # at most so much is lost when the job is killed


class Clock:
    """Seconds spent, kept in a file, so that those before a stop count too."""

    def __init__(self, path: Path, budget: float, started: float | None = None) -> None:
        """budget: seconds in all. started: of time.monotonic, where the work began before this."""
        self.path, self.budget = path, budget
        note = _read(path)
        self.stage = "choices"
        """The stage that time is counted for."""
        self.stages: dict[str, float] = defaultdict(float, note.get("stages", {}))
        self._mark = time.monotonic() if started is None else started
        self._saved = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of this start and all earlier ones."""
        self._count()
        return sum(self.stages.values())

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; negative when it is over."""
        return self.budget - self.spent

    def begin(self, stage: str) -> None:
        """Count the time from now on for a stage."""
        self._count()
        self.stage = stage

    def tick(self) -> None:
        """Save the time spent, at most every few seconds."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save the time spent."""
        self._count()
        self._saved = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stages = {name: round(seconds, 2) for name, seconds in self.stages.items()}
        write_json_atomic(self.path, {"stages": stages})

    def _count(self) -> None:
        now = time.monotonic()
        self.stages[self.stage] += now - self._mark
        self._mark = now


def _read(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
