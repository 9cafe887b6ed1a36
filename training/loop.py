"""The training loop that all training scripts share: resume, step, log, sample, checkpoint, stop on a signal."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenloom_common.errors import StoppedBySignalError
from training.config import RunConfig
from training.engine import Engine, Processes
from training.log import RunLog
from training.optim import lr_at
from training.run_state import RunState

log = logging.getLogger(__name__)

SAME_REQUEST_SECONDS = 1.0


@dataclass
class Task:
    """What a training script gives the loop."""

    name: str
    batches: Callable[[int], Iterable[Any]]  # first step -> this process's micro-batches, in order
    loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]  # micro-batch -> loss to minimise, terms to log
    metrics: Callable[[], dict[str, float]]  # more numbers for a log line
    sample: Callable[[int], None]  # write a sample grid; called on every process
    problem: Callable[[], Exception | None]  # what this process met that must end the run on all of them
    state: Callable[[], dict[str, Tensor]]  # this process's state beyond the engine's
    restore: Callable[[dict[str, Tensor]], None]


def run_training(task: Task, engine: Engine, config: RunConfig, group: Processes, run_state: RunState) -> bool:
    """Train to train.steps from the newest whole checkpoint, or from the start; False if there was nothing left to do.

    StoppedBySignalError after a signal.
    """
    window = _Window(config)
    first_step = _resume(task, engine, run_state, window)
    total = config.train.steps
    if first_step >= total:
        log.info("%s: already trained to step %d of %d; nothing to do", task.name, first_step, total)
        return False
    run_log = RunLog(run_state.run_dir, group.is_first, task.name, total, first_step)
    batches = iter(task.batches(first_step))
    try:
        with _stop_flag() as stop:
            for step in range(first_step, total):
                grad_norm, skipped = _one_step(task, engine, config, batches, step, window)
                run_log.step_done()
                done = step + 1
                if done % config.train.log_every == 0 or done in (1, total):
                    window.write(run_log, group, done, lr_at(step, total, config.optim), grad_norm, skipped, task)
                group.raise_together(task.problem())
                stopping = int(group.maximum(float(stop["signal"])))
                if stopping or done == total or _due(done, config.checkpoint.every_steps):
                    run_state.save(engine, done, task.state() | window.state())
                if stopping:
                    raise StoppedBySignalError(stopping)
                if _due(done, config.train.sample_every) or (config.train.sample_every and done == total):
                    with _random_state_kept(group):
                        task.sample(done)
    finally:
        run_log.close()
    return True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _random_state_kept(group: Processes) -> AbstractContextManager:
    """A look at the model must not change what a resumed run, which does not repeat it, would draw next."""
    return torch.random.fork_rng(devices=[group.device] if group.device.type == "cuda" else [])


def _resume(task: Task, engine: Engine, run_state: RunState, window: _Window) -> int:
    checkpoint = run_state.resume_from
    if checkpoint is None:
        log.info("%s: starting fresh in %s", task.name, run_state.run_dir)
        return 0
    step, tensors = run_state.load(engine, checkpoint)
    window.restore(tensors)
    task.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(_Window.PREFIX)})
    log.info("%s: continuing from %s", task.name, checkpoint)
    return step


def _one_step(task: Task, engine: Engine, config: RunConfig, batches: Iterator[Any], step: int,
              window: _Window) -> tuple[float, int]:
    engine.set_lr(lr_at(step, config.train.steps, config.optim))
    norm, skipped = float("nan"), 0
    for _ in range(config.train.accumulation):
        waited = time.perf_counter()
        batch = next(batches)
        window.data_seconds += time.perf_counter() - waited
        loss, terms = task.loss(batch)
        engine.backward(loss, step + 1)
        norm, skipped = engine.step(step + 1)
        window.add({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}})
    window.steps += 1
    return norm, skipped


class _Window:
    """Sums between two log lines; tensors stay on the device until the line is written. Part of a checkpoint."""

    PREFIX = "window."

    def __init__(self, config: RunConfig) -> None:
        self.batch_size = config.train.batch_size
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.parts = self.steps = 0
        self.resumed_steps = 0
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint between two log lines."""
        sums = {f"{self.PREFIX}sum.{name}": total for name, total in self.sums.items()}
        return {**sums, f"{self.PREFIX}counts": torch.tensor([self.parts, self.steps])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with the sums of a checkpoint; the time between is not counted."""
        start = f"{self.PREFIX}sum."
        self.sums = {name.removeprefix(start): total for name, total in tensors.items() if name.startswith(start)}
        self.parts, self.steps = (int(number) for number in tensors[f"{self.PREFIX}counts"])
        self.resumed_steps = self.steps

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            before = self.sums.get(name)
            self.sums[name] = value.float() if before is None else before.to(value.device) + value.float()
        self.parts += 1

    def write(self, run_log: RunLog, group: Processes, step: int, lr: float, grad_norm: float, skipped: int,
              task: Task) -> None:
        seconds = time.perf_counter() - self.started
        values: dict[str, Any] = {name: group.mean(float(total) / self.parts) for name, total in self.sums.items()}
        timed = self.steps - self.resumed_steps
        values |= {"lr": lr, "samples_per_s": timed * self.batch_size / seconds, "grad_norm": grad_norm,
                   "skipped_steps": skipped, "data_wait": self.data_seconds / seconds, **task.metrics()}
        run_log.metrics(step, values)
        self._clear()


@contextmanager
def _stop_flag() -> Iterator[dict[str, int]]:
    """SIGTERM and SIGINT set the flag; a second one, a second later, ends the program at once.

    Ctrl-C under a launcher arrives twice: from the terminal, and as the launcher's SIGTERM right behind it.
    """
    flag = {"signal": 0}
    first_at = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first_at
        if not flag["signal"]:
            flag["signal"], first_at = number, time.monotonic()
        elif time.monotonic() - first_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
