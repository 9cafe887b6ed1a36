"""One training stage within its time: steps follow from the measured speed, also on the way.

A stage that turns out slower or faster than it was measured is stopped after a checkpoint and goes
on with another number of steps, so that its learning rate still falls to its end.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.autotrain.choices import LEAST_STEPS
from training.autotrain.clock import Clock
from training.autotrain.launching import launch
from training.config.start_folders import TEXT_FOLDER
from training.runs.metrics import read_metrics
from training.runs.retention import BEST

log = logging.getLogger(__name__)

LOOK_SECONDS = 3.0  # between looks at the metrics
LEAST_LINES = 4  # of metrics.jsonl, before its speed is believed
LEAST_SECONDS = 12.0
MOST_RETIMINGS = 3


class Progress(NamedTuple):
    """Finished steps of a run; seconds a step since its last start, None while not known."""

    step: int
    seconds_per_step: float | None


@dataclass(frozen=True)
class Stage:
    """A script's run and its time.

    until: seconds of the clock at which it must have ended. start_seconds: until it trains.
    seconds_per_step: as measured before. steps: set by the user, which is then no matter of time.
    tolerance: share of the clock's budget by which it may end early or late.
    """

    name: str
    script: str
    run_dir: Path
    arguments: Sequence[object]
    until: float
    start_seconds: float
    seconds_per_step: float
    tolerance: float
    steps: int | None = None


def read_progress(run_dir: Path) -> Progress:
    """Read how far a run is, and how fast since it was last started."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]
    if not rows:
        return Progress(0, None)
    last = rows[-1]
    since = [last]
    for row in reversed(rows[:-1]):  # elapsed_s begins anew at each start
        if row["elapsed_s"] > since[-1]["elapsed_s"]:
            break
        since.append(row)
    first = since[-1]
    seconds = last["elapsed_s"] - first["elapsed_s"]
    if len(since) < LEAST_LINES or seconds < LEAST_SECONDS or last["step"] == first["step"]:
        return Progress(last["step"], None)
    return Progress(last["step"], seconds / (last["step"] - first["step"]))


def steps_until(until: float, now: float, start_seconds: float, done: int,
                seconds_per_step: float) -> int:
    """Steps in all with which a stage that starts now ends in time; no fewer than are done."""
    left = until - now - start_seconds
    return max(done, LEAST_STEPS, done + int(left / seconds_per_step))


def run_stage(stage: Stage, clock: Clock) -> None:
    """Train until the stage's time is over; goes on where a stopped one was."""
    clock.begin(stage.name)
    if stage.steps is not None:
        launch(stage.script, *stage.arguments, "--train.steps", stage.steps,
               look=_ticking(clock))
        clock.save()
        return

    speed = stage.seconds_per_step
    for number in range(MOST_RETIMINGS + 1):
        progress = read_progress(stage.run_dir)
        speed = progress.seconds_per_step or speed
        done = _saved_step(stage.run_dir)
        steps = steps_until(stage.until, clock.spent, stage.start_seconds, done, speed)
        log.info("%s: %d steps, %.2f s each, in the %.0f s that it has", stage.name, steps, speed,
                 max(0.0, stage.until - clock.spent))
        watch = _Watch(stage, clock, steps, may_stop=number < MOST_RETIMINGS)
        finished = launch(stage.script, *stage.arguments, "--train.steps", steps, look=watch)
        clock.save()
        if finished:
            return


def export_best(script: str, run_dir: Path, arguments: Sequence[object]) -> None:
    """Replace RUN/model by the export of the checkpoint that measured best on held-out images.

    arguments: of the script, without its run folder.
    """
    if not (run_dir / BEST).is_file():  # too short to be measured on its way
        return
    best = json.loads((run_dir / BEST).read_text(encoding="utf-8"))
    if best["step"] == _saved_step(run_dir):
        return
    log.info("the model of step %d is taken: it did best on held-out images", best["step"])
    # a run that has nothing left to do exports its checkpoint
    folder = run_dir.with_name(f"{run_dir.name}_best")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run_dir / best["checkpoint"], folder / best["checkpoint"])
    shutil.copytree(run_dir / TEXT_FOLDER, folder / TEXT_FOLDER)
    shutil.copy2(run_dir / "latest.json", folder)
    launch(script, *arguments, "--run_dir", folder, "--train.steps", best["step"])
    shutil.rmtree(run_dir / "model")
    shutil.move(folder / "model", run_dir / "model")
    shutil.rmtree(folder)


class _Watch:
    """Look at a running stage: whether it should be stopped, to go on with other steps."""

    def __init__(self, stage: Stage, clock: Clock, steps: int, may_stop: bool) -> None:
        self.stage, self.clock, self.steps, self.may_stop = stage, clock, steps, may_stop
        self._looked = 0.0
        self._lines_before = len(read_metrics(stage.run_dir / "metrics.jsonl"))

    def __call__(self) -> bool:
        self.clock.tick()
        if not self.may_stop or time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        lines = len(read_metrics(self.stage.run_dir / "metrics.jsonl"))
        if lines < self._lines_before + LEAST_LINES:  # those of an earlier start tell nothing
            return False
        progress = read_progress(self.stage.run_dir)
        if progress.seconds_per_step is None or progress.step >= self.steps:
            return False
        left = (self.steps - progress.step) * progress.seconds_per_step
        late = self.clock.spent + left - self.stage.until
        if not worth_stopping(late, left, self.clock.budget * self.stage.tolerance,
                              self.stage.start_seconds):
            return False
        log.info("%s: %.2f s a step, and it would end %.0f s too %s; goes on with other steps",
                 self.stage.name, progress.seconds_per_step, abs(late),
                 "late" if late > 0 else "early")
        return True


def worth_stopping(late: float, left: float, tolerated: float, start_seconds: float) -> bool:
    """Whether to start a stage again that ends `late` (negative: early) with `left` seconds to go.

    Another start takes time itself, and nothing can be gained at the very end.
    """
    if left < 2 * start_seconds:
        return False
    return abs(late) > max(tolerated, start_seconds)


def _ticking(clock: Clock):
    def look() -> bool:
        clock.tick()
        return False

    return look


def _saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, which a run goes on from."""
    steps = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)
