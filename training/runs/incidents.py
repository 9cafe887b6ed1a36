"""Note skipped steps and loss spikes, with the data they were made of."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_text_atomic
from training.data.visits.order import DataOrder
from training.runs.metrics import read_metrics

log = logging.getLogger(__name__)

HISTORY, LEAST = 100, 30  # most and fewest steps before it that a loss is compared with
DEVIATIONS = 6.0
MAD_TO_SIGMA = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
NAMED = 8  # keys in a message; the file has all
FILE = "incidents.jsonl"


class Incidents:
    """Watches the losses of one run; order: of the data; key: index of an item -> its key."""

    def __init__(self, run_dir: Path, batch_size: int, order: DataOrder, key: Callable[[int], str],
                 writes: bool, first_step: int = 0) -> None:
        """first_step: the run continues there; notes of later steps, which come again, go."""
        self._path = run_dir / "incidents" / FILE
        self._batch_size, self._order, self._key, self._writes = batch_size, order, key, writes
        self._losses: deque[float] = deque(maxlen=HISTORY)
        if writes and self._path.is_file():
            kept = [line for line in read_incidents(run_dir) if line["step"] <= first_step]
            write_text_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def skipped(self, step: int) -> None:
        """Note that step 0.. was skipped; the engine has logged why."""
        self._note(step, {"what": "skipped"}, f"step {step + 1} was made of")

    def loss(self, step: int, loss: float) -> None:
        """Take the loss of step 0.., and note it if it is a spike."""
        if not math.isfinite(loss):  # noted as skipped
            return
        if len(self._losses) >= LEAST:
            # medians, which a few earlier spikes do not move
            median = statistics.median(self._losses)
            distances = [abs(value - median) for value in self._losses]
            deviation = MAD_TO_SIGMA * statistics.median(distances)
            # and 10 %: where losses hardly vary, a small rise is many deviations
            if loss > median + max(DEVIATIONS * deviation, 0.1 * abs(median)):
                self._note(step, {"what": "spike", "loss": loss, "median": median},
                           f"step {step + 1}: loss {loss:.4g} is far above the "
                           f"{len(self._losses)} steps' before it (median {median:.4g}); it was "
                           "made of")
        self._losses.append(loss)

    def _note(self, step: int, facts: dict[str, Any], message: str) -> None:
        if not self._writes:
            return
        # of all processes: the order is a function of the seed, so that nobody has to be asked
        items = self._order.batch(step, self._batch_size)
        keys = [self._key(item.index) for item in items]
        log.warning("%s %s (all in %s)", message, first_keys(keys), self._path)

        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **facts, "keys": keys}) + "\n")


def first_keys(keys: Sequence[str]) -> str:
    """Name the first NAMED keys, and count the others."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{', '.join(keys[:NAMED])}{more}"


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's incidents."""
    return read_metrics(run_dir / "incidents" / FILE)
