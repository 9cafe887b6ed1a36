"""Where a run's numbers and sample grids go beside metrics.jsonl: TensorBoard, Weights & Biases.

A further place is a class with the methods of `LogWriter`, a line in KINDS, and the key of `LogConfig` that turns it on. All of
this happens on the first process alone.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy
from PIL import Image

from tokenloom_common.errors import UserError, one_line
from tokenloom_common.files import write_text_atomic
from training.config.run import LogConfig, RunConfig
from training.runs.metrics import read_metrics, sample_grids

GROUPS = {
    "optim": ("lr", "grad_norm", "skipped_steps"),
    "speed": ("samples_per_s", "tokens_per_s", "mfu", "data_wait", "memory_bytes"),
    "codebook": ("codebook_usage", "codebook_perplexity", "dead_codes", "restarted_codes"),
    "data": ("dropped_items",),
    "validation": ("validation_loss", "validation_psnr", "validation_top1"),
    "other": ("accuracy", "scale", "generator_weight", "logits_real", "logits_fake", "temperature", "kl_weight")}
"""Folder that a number is shown in -> names in metrics.jsonl; every other number is a term of the loss."""
NO_NUMBERS = ("step", "elapsed_s")
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def grouped(name: str) -> str:
    """`loss/l1`, `optim/discriminator.lr`: a name of metrics.jsonl below its folder."""
    return f"{_GROUP_OF.get(name.rpartition('.')[2] if name.endswith(('.lr', '.grad_norm')) else name, 'loss')}/{name}"


class LogWriter(Protocol):
    """A place that is told what a run logs. Built with the run's config and the step that it goes on from, 0 for a fresh one:
    what was told of later steps comes again."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by their names in metrics.jsonl."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture file."""

    def close(self) -> None:
        """Nothing follows."""


class TensorBoardWriter:
    """Event files in RUN/tensorboard. A resumed run tells TensorBoard to forget the steps that it repeats."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        package = _package("tensorboard")
        self._writer = package.SummaryWriter(str(Path(config.run_dir) / "tensorboard"),
                                             purge_step=first_step + 1 if first_step else None)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(grouped(name), value, step)
        self._writer.flush()  # what a killed run had logged before its last checkpoint is not logged again

    def picture(self, step: int, name: str, path: Path) -> None:
        """In TensorBoard's Images."""
        with Image.open(path) as image:
            self._writer.add_image(name, numpy.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases, offline unless log.wandb_mode or WANDB_MODE says otherwise. RUN/wandb-id keeps the run's id there.

    Online, a resumed run goes on behind what the server has: steps that it repeats are not sent, since exact resume gives them
    the same numbers. Offline, each start writes a part of its own, which is told everything from the beginning, so that the
    newest, RUN/wandb/latest-run, is whole.
    """

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self._wandb = _package("wandb")
        run_dir, mode = Path(config.run_dir), config.log.wandb_mode or os.environ.get("WANDB_MODE") or "offline"
        online = mode not in ("offline", "dryrun", "disabled")  # W&B's own words
        try:
            self._run = self._wandb.init(
                project=config.log.wandb_project or _unless_set("WANDB_PROJECT", "tokenloom"),
                name=_unless_set("WANDB_NAME", run_dir.resolve().name), id=_kept_id(run_dir / "wandb-id"), dir=str(run_dir),
                config=config.plain(), mode=mode, resume="allow" if online else None)
        except Exception as error:  # no login, no network, a mode that it does not know: each release has its own errors
            raise UserError(f"log.wandb: W&B cannot start: {one_line(error)}") from None
        self._begins_at = int(self._run.starting_step) if online else 0
        if first_step and not online:
            self._tell_again(run_dir, first_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One row of history."""
        self._log(step, {grouped(name): value for name, value in values.items()})

    def picture(self, step: int, name: str, path: Path) -> None:
        """In the media of the row."""
        self._log(step, {name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._begins_at:
            self._run.log(values, step=step)

    def _tell_again(self, run_dir: Path, first_step: int) -> None:
        """What the part before this one was told, a grid after the numbers of its step."""
        told: list[tuple[int, Callable[[], None]]] = []
        for row in read_metrics(run_dir / "metrics.jsonl"):
            numbers = {name: value for name, value in row.items() if name not in NO_NUMBERS and value is not None}
            told.append((row["step"], partial(self.metrics, row["step"], numbers)))
        told += [(step, partial(self.picture, step, path.parent.name, path)) for step, path in sample_grids(run_dir).items()]
        for step, tell in sorted(told, key=lambda one: one[0]):
            if step <= first_step:
                tell()


def _unless_set(variable: str, value: str) -> str | None:
    """None leaves the choice to W&B, which reads the variable."""
    return None if os.environ.get(variable) else value


def _kept_id(path: Path) -> str:
    if not path.is_file():
        write_text_atomic(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


class Kind(NamedTuple):
    """A place: its class, the key that turns it on, the module that it needs, and the extra that brings it."""

    writer: Callable[[RunConfig, int], LogWriter]
    wanted: Callable[[LogConfig], bool]
    module: str
    extra: str


KINDS = {
    "tensorboard": Kind(TensorBoardWriter, lambda config: config.tensorboard, "torch.utils.tensorboard", "log"),
    "wandb": Kind(WandbWriter, lambda config: config.wandb, "wandb", "wandb")}
"""Key of the `log` section -> what it turns on."""


def _package(name: str) -> ModuleType:
    kind = KINDS[name]
    try:
        return importlib.import_module(kind.module)
    except ImportError as error:
        raise UserError(f"log.{name} needs a package ({error}): pip install 'tokenloom[{kind.extra}]'") from None


def check_writers(config: LogConfig) -> None:
    """UserError for a package that is missing, before anything slow."""
    for name, kind in KINDS.items():
        if kind.wanted(config):
            _package(name)


def open_writers(config: RunConfig, first_step: int) -> dict[str, LogWriter]:
    """Every place that the config asks for, by its key. first_step: where the run goes on from."""
    return {name: kind.writer(config, first_step) for name, kind in KINDS.items() if kind.wanted(config.log)}
