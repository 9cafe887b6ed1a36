"""The loop of all training scripts: resume, step, log, sample, checkpoint, stop on a signal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom_common.errors import RunFailedError, StoppedBySignalError
from training.config.run import RunConfig
from training.data.visits.order import DataOrder
from training.engine.deepspeed_engine import Engine
from training.engine.gpus import peak_flops, training_flops
from training.engine.processes import Processes, shared
from training.engine.stopping import StopFlag, stop_flag
from training.engine.watchdog import Watchdog
from training.loop.log import RunLog
from training.loop.window import Window, memory
from training.loop.writers import LogWriter, open_writers
from training.runs.incidents import Incidents
from training.runs.retention import Measured
from training.runs.run_state import RunState

log = logging.getLogger(__name__)

SKIPPED = "skipped."  # prefix of the engines' counts of skipped steps in a checkpoint


@dataclass
class Task:
    """A training script's run as the loop sees it."""

    name: str
    engines: Sequence[Engine]  # all that are trained; the first is the model's
    batches: Callable[[int], Iterable[Any]]  # first step -> this process's micro-batches, in order
    train: Callable[[Any, int], dict[str, Tensor]]
    """Micro-batch, step 0.. -> gradients and optimizer steps; returns terms to log, "loss" among
    them."""
    metrics: Callable[[], dict[str, float]]  # further numbers for a log line
    sample: Callable[[int], None]  # write a sample grid; called on every process
    problem: Callable[[], Exception | None]  # error of this process that must end the run on all
    state: Callable[[], dict[str, Tensor]]  # this process's state beyond the engines'
    restore: Callable[[dict[str, Tensor]], None]
    order: DataOrder  # in which the data is visited
    key: Callable[[int], str]  # index of an item -> its key, for messages
    validate: Callable[[int], Measured]
    """Measure the held-out split, which train.validate_every needs; called on every process."""
    tokens_per_item: int = 0  # image tokens that are learned from one item; 0 = the task has none
    forward_flops: Callable[[], int] | None = None
    """FLOPs of one item's forward; asked for only where the device's peak is known."""

    def save(self, folder: Path) -> None:
        """Write every engine's part of a checkpoint."""
        for engine in self.engines:
            engine.save(folder)

    def load(self, folder: Path, resharded: bool = False) -> None:
        """Read the files that `save` wrote; resharded: on another number of processes."""
        for engine in self.engines:
            engine.load(folder, resharded)

    @property
    def skipped(self) -> int:
        """Skipped steps of the engine that skipped most: one bad step may be skipped by several."""
        return max(engine.skipped for engine in self.engines)


def run_training(task: Task, config: RunConfig, group: Processes, run_state: RunState) -> bool:
    """Train to train.steps from the newest whole checkpoint, or from the start; False if done.

    StoppedBySignalError after a signal; RunFailedError, after a checkpoint, when too many steps
    were not finite.
    """
    window = Window(config.train.batch_size, task.tokens_per_item, _peak_share(task, group))
    first_step, total = _resume(task, run_state, window), config.train.steps
    if first_step >= total:
        log.info("%s: already trained to step %d of %d; nothing to do", task.name, first_step,
                 total)
        return False

    loop = _Loop(task, config, group, run_state, window, first_step)
    try:
        with stop_flag() as stop, loop.watchdog.watching():
            for step in range(first_step, total):
                loop.train_step(step)
                loop.after_step(step + 1, stop)
    finally:
        loop.run_log.close()
    return True


class _Loop:
    """One call of run_training: its log, its watchdog, and the work after each step."""

    def __init__(self, task: Task, config: RunConfig, group: Processes, run_state: RunState,
                 window: Window, first_step: int) -> None:
        self.task, self.config, self.group = task, config, group
        self.run_state, self.window = run_state, window
        self.total = config.train.steps

        writers: dict[str, LogWriter] = {}
        group.first_does(lambda: writers.update(open_writers(config, first_step)))
        self.run_log = RunLog(run_state.run_dir, group.is_first, task.name, self.total, first_step,
                              writers)
        self.batches = iter(task.batches(first_step))
        self.skipped_before = task.skipped  # max_skipped_steps counts from each start anew
        self.incidents = Incidents(run_state.run_dir, config.train.batch_size, task.order, task.key,
                                   group.is_first, first_step)
        self.watchdog = Watchdog(run_state.run_dir, group, config.train.stall_seconds)

    def train_step(self, step: int) -> None:
        """Train step 0.., and note what went wrong in it."""
        skipped_before = self.task.skipped
        loss = run_step(self.task, self.config, self.batches, step, self.window)
        if self.task.skipped > skipped_before:
            self.incidents.skipped(step)
        # the largest of all processes: a spike on one is a spike
        self.incidents.loss(step, self.group.maximum(loss))
        self.run_log.step_done()
        self.watchdog.beat(step + 1)

    def after_step(self, done: int, stop: StopFlag) -> None:
        """Log, measure, save, sample, and end the run where it must; `done`: steps so far."""
        train, checkpoint = self.config.train, self.config.checkpoint
        if done % train.log_every == 0 or done in (1, self.total):
            self._write_line(done)

        # every process must take the same branches below, so each decision is made together
        self.group.raise_together(self.task.problem())
        signal = int(self.group.maximum(float(stop.signal)))
        skipped = self.task.skipped - self.skipped_before
        too_many_skipped = skipped > train.max_skipped_steps
        is_ending = bool(signal) or too_many_skipped

        measured = None
        if not is_ending and self._due(done, train.validate_every):
            measured = self._validate(done)
        if is_ending or done == self.total or self._due(done, checkpoint.every_steps):
            self._save(done, measured)

        # only now, after a checkpoint that a repaired run can continue from
        if too_many_skipped:
            raise shared(RunFailedError(
                f"{skipped} steps were skipped because a loss term or gradient, named above, was "
                f"not finite (train.max_skipped_steps {train.max_skipped_steps}); checkpoint of "
                f"step {done} saved. Lower optim.lr, lengthen optim.warmup_steps, or look at the "
                "data"))
        if signal:
            raise StoppedBySignalError(signal)
        if self._due(done, train.sample_every):
            with _random_state_kept(self.group), self._apart():
                self.task.sample(done)
            self.run_log.sampled(done)

    def _due(self, done: int, every: int) -> bool:
        return every > 0 and (done % every == 0 or done == self.total)

    def _validate(self, done: int) -> Measured:
        with _random_state_kept(self.group), self._apart():
            measured = self.task.validate(done)
        self.run_log.metrics(done, {measured.name: measured.value})
        return measured

    def _save(self, done: int, measured: Measured | None) -> None:
        skips = {f"{SKIPPED}{engine.name}": torch.tensor(engine.skipped)
                 for engine in self.task.engines}
        with self._apart():
            state = self.task.state() | self.window.state() | skips
            self.run_state.save(self.task, done, state, measured)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Work between steps that is no training: neither a stall nor part of the speed."""
        with self.watchdog.paused(), self.window.apart():
            yield

    def _write_line(self, done: int) -> None:
        """Log the means since the last line, the speed, and the state of the optimizers."""
        first, *others = self.task.engines
        speed = self.window.speed()  # first, since means wait for the other processes
        values: dict[str, Any] = {**self.window.means(self.group), **speed, **memory(self.group)}
        values |= {"lr": first.lr_of(done - 1), "grad_norm": first.grad_norm,
                   "skipped_steps": self.task.skipped}
        for engine in others:
            values |= {f"{engine.name}.lr": engine.lr_of(done - 1),
                       f"{engine.name}.grad_norm": engine.grad_norm}
        self.run_log.metrics(done, values | self.task.metrics())
        self.window.clear()


def run_step(task: Task, config: RunConfig, batches: Iterator[Any], step: int, window: Window
             ) -> float:
    """Train on all micro-batches of a step -> the largest of their losses; NaN if one is NaN."""
    losses = []
    for engine in task.engines:
        engine.set_lr(engine.lr_of(step))
    for _ in range(config.train.accumulation):
        waiting_since = time.perf_counter()
        batch = next(batches)
        window.data_seconds += time.perf_counter() - waiting_since

        terms = task.train(batch, step)
        window.add(terms)
        losses.append(terms["loss"])
    window.steps += 1  # of the optimizer, not micro-batches
    return float(torch.stack(losses).max())


def _peak_share(task: Task, group: Processes) -> float | None:
    """Share of all devices' FLOPs that one item a second takes; None where either is unknown.

    Counted on the first process alone, which writes the log.
    """
    device = group.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name, task.engines[0].precision)
    if peak is None or task.forward_flops is None or not group.is_first:
        return None
    with _random_state_kept(group):
        return training_flops(task.forward_flops()) / (peak * group.world_size)


def _random_state_kept(group: Processes) -> AbstractContextManager:
    """Keep random state: a look at the model, which a resumed run does not repeat, draws too."""
    return torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else [])


def _resume(task: Task, run_state: RunState, window: Window) -> int:
    """Load the checkpoint to continue from, if there is one -> the number of finished steps."""
    checkpoint = run_state.resume_from
    if checkpoint is None:
        log.info("%s: starting fresh in %s", task.name, run_state.run_dir)
        return 0

    step, tensors = run_state.load(task, checkpoint)
    if not run_state.resharded:  # sums between two log lines are each process's own
        window.restore(tensors)
    for engine in task.engines:
        engine.skipped = int(tensors[f"{SKIPPED}{engine.name}"])
    # the rest is the script's own
    of_the_loop = (Window.PREFIX, SKIPPED)
    task.restore({name: tensor for name, tensor in tensors.items()
                  if not name.startswith(of_the_loop)})
    log.info("%s: continuing from %s", task.name, checkpoint)
    return step
