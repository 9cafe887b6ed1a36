"""The parts that all training scripts share: batches, engine, moving average, held-out split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from seq2seq import FrozenTextEncoder, TextSource
from training.config.run import DataConfig, RunConfig
from training.config.text import TextConfig
from training.data.run_data import open_training_images
from training.data.sources.captioned_images import CaptionedImages
from training.data.text_features import open_features
from training.data.text_input import CaptionRows
from training.data.visits.loader import batch_loader
from training.data.visits.order import DataOrder, MicroBatches
from training.data.visits.tokens import CaptionEncoder
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import resolve_precision
from training.engine.optim import build_optimizer
from training.engine.processes import Processes
from training.engine.weight_average import weight_average
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.runs.run_state import RunState


class Training:
    """One run of a training script, set up in the order check -> open -> warm start -> build.

    Whatever can be refused is refused before the run folder is touched. All processes must call
    `metrics`, `full_model`, `sample`, `validate` and `finish`. A subclass sets these attributes.
    """

    config: RunConfig
    run_state: RunState
    order: DataOrder
    visits: Any
    """The data as a loader reads it, and in `collate` the function that makes its batches."""
    collate: Any
    drops: PictureDrops | None = None
    """Unusable images, of data that has images."""
    engine: Engine
    average: AveragedModel | None = None
    """A float32 copy that follows the weights slowly, on the first process, which samples, measures
    and exports."""

    def __init__(self, config: RunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.precision = resolve_precision(config, group.device)
        # step -> report, of the newest measured step alone
        self._held_out_reports: dict[int, Any] = {}

    # ---- set-up

    def micro_batch_size(self) -> int:
        """Items that a process sees at a time.

        UserError for a batch that cannot be divided, or an unusable DeepSpeed JSON.
        """
        # one stands for any number of parameters, which only the sizes of buckets depend on
        json = deepspeed_json(self.config, self.group.world_size, self.precision, parameters=1)
        return json["train_micro_batch_size_per_gpu"]

    def start_engine(self, module: nn.Module) -> None:
        """Give `module` its engine and, if the config asks for one, its moving average."""
        # the copy comes first: the engine may round the weights to bfloat16
        decay = self.config.train.weight_ema
        if decay and self.group.is_first:
            self.average = weight_average(module, decay, self.group.device)
        self.engine = Engine(module, build_optimizer(module, self.config.optim), self.config,
                             self.group, self.precision)

    # ---- while it trains

    def batches(self, first_step: int) -> Iterable[Any]:
        """Yield this process's micro-batches from `first_step` on."""
        train, group = self.config.train, self.group
        order = MicroBatches(self.order, train.batch_size, train.accumulation, group.rank,
                             group.world_size, first_step, train.steps)
        data: DataConfig = self.config.data  # type: ignore[attr-defined]
        return batch_loader(self.visits, order, data.workers, self.collate)

    def update_average(self) -> None:
        """Let the average follow the weights if the last micro-batch changed them."""
        # within a window, and after a skipped step, the weights are the same as before
        if self.average is not None and self.engine.window_applied:
            self.average.update_parameters(self.engine.module)

    def problem(self) -> Exception | None:
        """An error of this process alone that must end the run on all of them."""
        return self.drops.problem if self.drops is not None else None

    def metrics(self) -> dict[str, float]:
        """Return further numbers of a log line. All processes must call it."""
        return {"dropped_items": self.drops.total()} if self.drops is not None else {}

    def parts(self) -> dict[str, nn.Module]:
        """Modules without an engine whose state belongs to a checkpoint, by name."""
        return {} if self.average is None else {"average": self.average}

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint beside the engines'."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.parts().items():
            tensors |= add_prefix(f"{name}.", module.state_dict())
        return tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors that `state` gave."""
        for name, module in self.parts().items():
            module.load_state_dict(with_prefix(f"{name}.", state))

    # ---- what comes of it

    def current_weights(self) -> dict[str, Tensor]:
        """Return the weights, whole in float32 on the CPU, or their average. On all processes."""
        # gathers shards, so also on the processes that have no average
        state = self.engine.full_state()
        # before its first update it holds the weights before the run
        if self.average is not None and int(self.average.n_averaged):
            return self.average.module.state_dict()
        return state

    def held_out_report(self, model: Any, step: int, quiet: bool = False) -> Any:
        """Measure `model`, the weights after `step`, on the held-out split, once for each step."""
        # train.validate_every and `finish` both measure the last step
        if step not in self._held_out_reports:
            self._held_out_reports = {step: self.measure(model, quiet)}
        return self._held_out_reports[step]

    def measure(self, model: Any, quiet: bool) -> Any:
        """Measure `model` on the held-out split; called on the first process."""
        raise NotImplementedError

    def task(self) -> Task:
        """The run as the training loop sees it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model. All processes must call it."""
        raise NotImplementedError


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def open_held_out_pictures(data: DataConfig, group: Processes) -> CaptionedImages | None:
    """Open the held-out images on the first process, which measures; else, or without, None."""
    opened: list[CaptionedImages] = []

    def open_split() -> None:
        source = open_training_images(data, data.validation_split)
        len(source)  # it must be readable now, not after hours of training
        opened.append(source)

    if data.validation_split:
        group.first_does(open_split)
    return opened[0] if opened else None


def batch_captions(source: TextSource, text: TextConfig, data: Sequence[CaptionRows],
                   group: Processes) -> CaptionEncoder:
    """Return the source of a batch's text input: `source` itself, or its features from disk.

    The cache gets the captions of all `data`.
    """
    if not isinstance(source, FrozenTextEncoder) or text.feature_cache is None:
        return source
    folder = Path(text.feature_cache)
    captions = [caption for rows in data for caption in rows.all_captions()]

    def write() -> None:
        open_features(source, folder, captions, may_write=True)

    group.first_does(write)  # then the others read what it wrote
    return open_features(source, folder, captions, may_write=False)
