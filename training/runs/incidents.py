"""Steps that went wrong, with the data they were made of: skipped ones, and losses far above those before them."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_text_atomic
from training.data.visits.order import DataOrder

log = logging.getLogger(__name__)

HISTORY, LEAST = 100, 30  # steps that a loss is compared with
DEVIATIONS = 6.0
NAMED = 8  # keys in a message; the file has all
FILE = "incidents.jsonl"


class Incidents:
    """Watches the losses of one run. order: of the data; key: index of an item -> its key in the data."""

    def __init__(self, run_dir: Path, batch_size: int, order: DataOrder, key: Callable[[int], str], writes: bool,
                 first_step: int = 0) -> None:
        """first_step: where the run goes on; what was noted of steps after it, which come again, is dropped."""
        self._path = run_dir / "incidents" / FILE
        self._batch_size, self._order, self._key, self._writes = batch_size, order, key, writes
        self._losses: deque[float] = deque(maxlen=HISTORY)
        if writes and self._path.is_file():
            kept = [line for line in read_incidents(run_dir) if line["step"] <= first_step]
            write_text_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def skipped(self, step: int) -> None:
        """Step 0.. was skipped, as a message before this one says."""
        self._note(step, {"what": "skipped"}, f"step {step + 1} was made of")

    def loss(self, step: int, loss: float) -> None:
        """The loss of step 0.., which is noted if it is a spike."""
        if not math.isfinite(loss):
            return
        if len(self._losses) >= LEAST:
            middle = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in self._losses)  # a standard deviation, robustly
            if loss > middle + max(DEVIATIONS * spread, 0.1 * abs(middle)):
                self._note(step, {"what": "spike", "loss": loss, "median": middle},
                           f"step {step + 1}: loss {loss:.4g} is far above the {len(self._losses)} steps' before it (median "
                           f"{middle:.4g}); it was made of")
        self._losses.append(loss)

    def _note(self, step: int, facts: dict[str, Any], message: str) -> None:
        if not self._writes:
            return
        keys = [self._key(item.index) for item in self._order.batch(step, self._batch_size)]
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        log.warning("%s %s%s (all in %s)", message, ", ".join(keys[:NAMED]), more, self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **facts, "keys": keys}) + "\n")


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's incidents; a half-written last one is left out."""
    found = []
    path = run_dir / "incidents" / FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
