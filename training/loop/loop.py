"""The training loop that all training scripts share: resume, step, log, sample, checkpoint, stop on a signal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
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
from training.engine.stopping import stop_flag
from training.engine.watchdog import Watchdog
from training.loop.log import RunLog
from training.loop.window import Window, memory
from training.loop.writers import LogWriter, open_writers
from training.runs.incidents import Incidents
from training.runs.retention import Measured
from training.runs.run_state import RunState

log = logging.getLogger(__name__)


@dataclass
class Task:
    """What a training script gives the loop."""

    name: str
    engines: Sequence[Engine]  # all that are trained; the first is what the run is about
    batches: Callable[[int], Iterable[Any]]  # first step -> this process's micro-batches, in order
    train: Callable[[Any, int], dict[str, Tensor]]  # micro-batch, step 0.. -> gradients and optimizer steps; terms to log
    metrics: Callable[[], dict[str, float]]  # more numbers for a log line
    sample: Callable[[int], None]  # write a sample grid; called on every process
    problem: Callable[[], Exception | None]  # what this process met that must end the run on all of them
    state: Callable[[], dict[str, Tensor]]  # this process's state beyond the engines'
    restore: Callable[[dict[str, Tensor]], None]
    order: DataOrder  # in which the data is visited
    key: Callable[[int], str]  # index of an item -> its key, for messages
    validate: Callable[[int], Measured]  # measure the held-out split, which train.validate_every needs; called on every process
    tokens_per_item: int = 0  # image tokens that are learned from one item; 0 = the task has none
    forward_flops: Callable[[], int] | None = None  # of one item; counted only where it is known what the device can do

    def save(self, folder: Path) -> None:
        """Every engine's part of a checkpoint."""
        for engine in self.engines:
            engine.save(folder)

    def load(self, folder: Path, resharded: bool = False) -> None:
        """Read what `save` wrote; resharded: on another number of processes."""
        for engine in self.engines:
            engine.load(folder, resharded)

    @property
    def skipped(self) -> int:
        """Steps that were skipped: of the engine that skipped most, since one bad step is skipped by all."""
        return max(engine.skipped for engine in self.engines)


def run_training(task: Task, config: RunConfig, group: Processes, run_state: RunState) -> bool:
    """Train to train.steps from the newest whole checkpoint, or from the start; False if there was nothing left to do.

    StoppedBySignalError after a signal; RunFailedError, after a checkpoint, when too many steps were not finite.
    """
    window = Window(config.train.batch_size, task.tokens_per_item, _peak_share(task, group))
    first_step = _resume(task, run_state, window)
    total = config.train.steps
    if first_step >= total:
        log.info("%s: already trained to step %d of %d; nothing to do", task.name, first_step, total)
        return False
    writers: dict[str, LogWriter] = {}
    group.first_does(lambda: writers.update(open_writers(config, first_step)))
    run_log = RunLog(run_state.run_dir, group.is_first, task.name, total, first_step, writers)
    batches = iter(task.batches(first_step))
    skipped_before = task.skipped
    incidents = Incidents(run_state.run_dir, config.train.batch_size, task.order, task.key, group.is_first,
                          first_step)
    watchdog = Watchdog(run_state.run_dir, group, config.train.stall_seconds)
    try:
        with stop_flag() as stop, watchdog.watching():
            for step in range(first_step, total):
                before, loss = task.skipped, _one_step(task, config, batches, step, window)
                if task.skipped > before:
                    incidents.skipped(step)
                incidents.loss(step, group.maximum(loss))
                run_log.step_done()
                done = step + 1
                watchdog.beat(done)
                if done % config.train.log_every == 0 or done in (1, total):
                    _write_line(run_log, window, group, done, task)
                group.raise_together(task.problem())
                stopping = int(group.maximum(float(stop.signal)))
                skipped = task.skipped - skipped_before
                too_many = skipped > config.train.max_skipped_steps
                ending = stopping or too_many
                measured = None
                if not ending and _due(done, config.train.validate_every, total):
                    with _random_state_kept(group), watchdog.paused(), window.apart():
                        measured = task.validate(done)
                    run_log.metrics(done, {measured.name: measured.value})
                if ending or done == total or _due(done, config.checkpoint.every_steps, total):
                    with watchdog.paused(), window.apart():
                        run_state.save(task, done, task.state() | window.state() | _skips(task), measured)
                if too_many:
                    raise shared(RunFailedError(
                        f"{skipped} steps were skipped because a loss term or gradient, named above, was not finite "
                        f"(train.max_skipped_steps {config.train.max_skipped_steps}); checkpoint of step {done} saved. "
                        "Lower optim.lr, lengthen optim.warmup_steps, or look at the data"))
                if stopping:
                    raise StoppedBySignalError(stopping)
                if _due(done, config.train.sample_every, total):
                    with _random_state_kept(group), watchdog.paused(), window.apart():
                        task.sample(done)
                    run_log.sampled(done)
    finally:
        run_log.close()
    return True


SKIPPED = "skipped."


def _skips(task: Task) -> dict[str, Tensor]:
    return {f"{SKIPPED}{engine.name}": torch.tensor(engine.skipped) for engine in task.engines}


def _due(step: int, every: int, total: int) -> bool:
    return every > 0 and (step % every == 0 or step == total)


def _random_state_kept(group: Processes) -> AbstractContextManager:
    """A look at the model must not change what a resumed run, which does not repeat it, would draw next."""
    return torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else [])


def _peak_share(task: Task, group: Processes) -> float | None:
    """What one item a second takes of all that the devices can compute; None where that or the task's FLOPs are not known."""
    name = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else group.device.type
    peak = peak_flops(name, task.engines[0].precision)
    if peak is None or task.forward_flops is None or not group.is_first:
        return None
    with _random_state_kept(group):
        return training_flops(task.forward_flops()) / (peak * group.world_size)


def _resume(task: Task, run_state: RunState, window: Window) -> int:
    checkpoint = run_state.resume_from
    if checkpoint is None:
        log.info("%s: starting fresh in %s", task.name, run_state.run_dir)
        return 0
    step, tensors = run_state.load(task, checkpoint)
    if not run_state.resharded:  # sums between two log lines are each process's own: a new line begins
        window.restore(tensors)
    for engine in task.engines:
        engine.skipped = int(tensors[f"{SKIPPED}{engine.name}"])
    own = (Window.PREFIX, SKIPPED)
    task.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(own)})
    log.info("%s: continuing from %s", task.name, checkpoint)
    return step


def _one_step(task: Task, config: RunConfig, batches: Iterator[Any], step: int, window: Window) -> float:
    """All micro-batches of a step -> the largest of their losses; NaN if one is no number."""
    losses = []
    for engine in task.engines:
        engine.set_lr(engine.lr_of(step))
    for _ in range(config.train.accumulation):
        waited = time.perf_counter()
        batch = next(batches)
        window.data_seconds += time.perf_counter() - waited
        terms = task.train(batch, step)
        window.add(terms)
        losses.append(terms["loss"])
    window.steps += 1
    return float(torch.stack(losses).max())


def _write_line(run_log: RunLog, window: Window, group: Processes, step: int, task: Task) -> None:
    """What was learned since the last line, how fast, and what the optimizers did."""
    first, *others = task.engines
    speed = window.speed()  # before the processes wait for one another
    values: dict[str, Any] = {**window.means(group), **speed, **memory(group), "lr": first.lr_of(step - 1),
                              "grad_norm": first.grad_norm, "skipped_steps": task.skipped}
    for engine in others:
        values |= {f"{engine.name}.lr": engine.lr_of(step - 1), f"{engine.name}.grad_norm": engine.grad_norm}
    run_log.metrics(step, values | task.metrics())
    window.clear()
