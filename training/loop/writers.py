"""Writers of a run's numbers and sample grids beside metrics.jsonl: TensorBoard, Weights & Biases.

A further writer is a class with the methods of `LogWriter`, a line in WRITERS, and the key of
`LogConfig` that turns it on. All of this happens on the first process alone.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy
from PIL import Image

from tokenloom_common.errors import UserError, one_line
from tokenloom_common.extras import require_extra
from tokenloom_common.files import write_text_atomic
from training.config.run import LogConfig, RunConfig
from training.runs.metrics import read_metrics, sample_grids

GROUPS = {"optim": ("lr", "grad_norm", "skipped_steps"),
          "speed": ("samples_per_s", "tokens_per_s", "mfu", "data_wait", "memory_bytes"),
          "codebook": ("codebook_usage", "codebook_perplexity", "dead_codes", "restarted_codes",
                       "reconstruction_spread"),
          "data": ("dropped_items",),
          "validation": ("validation_loss", "validation_psnr", "validation_top1"),
          "other": ("accuracy", "scale", "generator_weight", "logits_real", "logits_fake",
                    "temperature", "kl_weight")}
"""Folder that a number is shown in -> names in metrics.jsonl; every other number is a term of the
loss."""
NO_NUMBERS = ("step", "elapsed_s")  # keys of a row that are not written as curves
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def grouped(name: str) -> str:
    """Put a name of metrics.jsonl below its folder: `loss/l1`, `optim/discriminator.lr`."""
    own_name = name
    if name.endswith((".lr", ".grad_norm")):  # of a further engine, before the dot
        own_name = name.rpartition(".")[2]
    return f"{_GROUP_OF.get(own_name, 'loss')}/{name}"


class LogWriter(Protocol):
    """A place that a run logs to.

    Built with the run's config and the step that it continues from, 0 for a fresh one: whatever it
    was told of later steps comes again.
    """

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write finite numbers by their names in metrics.jsonl."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Write an image file."""

    def close(self) -> None:
        """Finish; nothing follows."""


class TensorBoardWriter:
    """Event files in RUN/tensorboard; a resumed run has the steps that it repeats forgotten."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        folder = str(Path(config.run_dir) / "tensorboard")
        # TensorBoard drops this step and all after it
        purge_step = first_step + 1 if first_step else None
        package = _package("tensorboard")
        self._writer = package.SummaryWriter(folder, purge_step=purge_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(grouped(name), value, step)
        # a resumed run does not repeat the steps before its checkpoint: they must be on disk
        self._writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        """Show it among TensorBoard's Images."""
        with Image.open(path) as file:
            pixels = numpy.asarray(file.convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases, offline unless log.wandb_mode or WANDB_MODE says otherwise.

    RUN/wandb-id keeps the run's id there. Online, a resumed run continues behind what the server
    has: steps that it repeats are not sent, since exact resume gives them the same numbers.
    Offline, each start writes a part of its own, which gets all rows from the beginning, so that
    the newest, RUN/wandb/latest-run, is whole.
    """

    def __init__(self, config: RunConfig, first_step: int) -> None:
        self._wandb = _package("wandb")
        run_dir = Path(config.run_dir)
        mode = config.log.wandb_mode or os.environ.get("WANDB_MODE") or "offline"
        is_online = mode not in ("offline", "dryrun", "disabled")  # W&B's own words
        project = config.log.wandb_project or _unless_set("WANDB_PROJECT", "tokenloom")
        try:
            self._run = self._wandb.init(
                project=project, name=_unless_set("WANDB_NAME", run_dir.resolve().name),
                id=_kept_id(run_dir / "wandb-id"), dir=str(run_dir), config=config.plain(),
                mode=mode, resume="allow" if is_online else None)
        except Exception as error:  # no login, no network, unknown mode: errors differ by release
            raise UserError(f"log.wandb: W&B cannot start: {one_line(error)}; log in with "
                            "`wandb login`, or set --log.wandb_mode offline") from None
        self._begins_at = int(self._run.starting_step) if is_online else 0
        if first_step and not is_online:
            self._replay(run_dir, first_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write one row of history."""
        self._log(step, {grouped(name): value for name, value in values.items()})

    def image(self, step: int, name: str, path: Path) -> None:
        """Add it to the media of the row."""
        self._log(step, {name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._begins_at:
            self._run.log(values, step=step)

    def _replay(self, run_dir: Path, first_step: int) -> None:
        """Write again the rows and grids up to `first_step`, a grid after the row of its step."""
        grids = sample_grids(run_dir)
        calls: list[tuple[int, Callable[[], None]]] = []
        for row in read_metrics(run_dir / "metrics.jsonl"):
            numbers = {name: value for name, value in row.items()
                       if name not in NO_NUMBERS and value is not None}
            calls.append((row["step"], partial(self.metrics, row["step"], numbers)))
        for step, path in grids.items():
            calls.append((step, partial(self.image, step, path.parent.name, path)))

        # W&B takes steps in order; the sort is stable, so that a step's row stays before its grid
        for step, call in sorted(calls, key=lambda step_and_call: step_and_call[0]):
            if step <= first_step:
                call()


def _unless_set(variable: str, value: str) -> str | None:
    """Return `value`, or None to leave the choice to W&B, which reads the variable."""
    return None if os.environ.get(variable) else value


def _kept_id(path: Path) -> str:
    """Return the id in a file, made when it is first asked for."""
    if not path.is_file():
        write_text_atomic(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


class WriterKind(NamedTuple):
    """A writer, whether a config asks for it, the module it needs, and the extra that has that."""

    writer: Callable[[RunConfig, int], LogWriter]
    is_wanted: Callable[[LogConfig], bool]
    module: str
    extra: str


WRITERS = {
    "tensorboard": WriterKind(TensorBoardWriter, lambda config: config.tensorboard,
                              "torch.utils.tensorboard", "log"),
    "wandb": WriterKind(WandbWriter, lambda config: config.wandb, "wandb", "wandb")}
"""Key of the `log` section -> the writer that it turns on."""


def _package(name: str) -> Any:
    kind = WRITERS[name]
    return require_extra(kind.module, f"log.{name}", kind.extra)


def check_writers(config: LogConfig) -> None:
    """Raise UserError for a package that is missing, before anything slow."""
    for name, kind in WRITERS.items():
        if kind.is_wanted(config):
            _package(name)


def open_writers(config: RunConfig, first_step: int) -> dict[str, LogWriter]:
    """Open every writer that the config asks for, by its key; the run continues at `first_step`."""
    return {name: kind.writer(config, first_step) for name, kind in WRITERS.items()
            if kind.is_wanted(config.log)}
