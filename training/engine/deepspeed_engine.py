"""The only importer of DeepSpeed: processes, one engine per trained module, and its checkpoints.

Everything a training script asks of DeepSpeed goes through here, so that what DeepSpeed 0.19 does not do by itself is
done in one place: its JSON is derived from our config, clipping is always explicit, a step with a non-finite loss or
gradient is skipped in every mode and counted, checkpoints carry the random state of every rank, and `latest` is ours.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenloom_common.errors import RunFailedError
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import _import_deepspeed
from training.engine.optim import lr_at
from training.engine.processes import Processes
from training.engine.universal import INFO, to_universal

log = logging.getLogger(__name__)

DEEPSPEED_TAG = "deepspeed"  # folder inside a checkpoint that holds what DeepSpeed itself writes
MODEL = "model"  # name of the engine that a run is about; a further one (a discriminator) has its own


class Engine:
    """One module under DeepSpeed with its own optimizer."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, group: Processes,
                 precision: str, optim: OptimConfig | None = None, name: str = MODEL, start_step: int = 0) -> None:
        """optim: of this engine, default the run's; start_step: the run's step from which its own schedule counts."""
        deepspeed = _import_deepspeed()
        self.group = group
        self.precision = precision
        self.name = name
        self.optim = optim or config.optim
        self.start_step, self.total_steps = start_step, config.train.steps
        self.grad_norm = math.nan
        """Of the last step, before clipping."""
        self.skipped = 0
        """Steps skipped since the run began, because a term or gradient was not finite."""
        self.window_closed = False
        """Whether the last micro-batch ended an accumulation window."""
        self.window_applied = False
        """Whether it did, and the optimizer's step changed the weights."""
        self._not_finite: set[str] = set()  # in this accumulation window
        self._stage = config.deepspeed.zero_stage
        if precision == "float32":  # else DeepSpeed rounds it first: then half as much is moved, and has to fit
            module = module.to(group.device)
        frozen = [(parameter, parameter.data) for parameter in module.parameters() if not parameter.requires_grad]
        parameters = sum(p.numel() for p in module.parameters())
        if config.train.compile:
            module.compile()  # in place: names in checkpoints stay as they are
        # At stage 0 in bfloat16 DeepSpeed takes a step with gradients of 0, which would count, and decay the weights.
        with _without_steps(optimizer) if self._stage == 0 else nullcontext():
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer,
                config=deepspeed_json(config, group.world_size, precision, parameters, self.optim))
        for parameter, as_it_was in frozen:  # DeepSpeed rounds them to bfloat16 too, though they have no float32 copy anywhere
            parameter.data = as_it_was.to(group.device)

    @property
    def module(self) -> nn.Module:
        """The module inside."""
        return self._engine.module

    def __call__(self, *inputs: Tensor) -> Any:
        return self._engine(*inputs)

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def lr_of(self, step: int) -> float:
        """The learning rate of the run's step 0 .. steps-1; 0 before this engine starts."""
        if step < self.start_step:
            return 0.0
        return lr_at(step - self.start_step, max(1, self.total_steps - self.start_step), self.optim)

    def backward(self, loss: Tensor, step: int, terms: dict[str, Tensor] | None = None) -> None:
        """Accumulate gradients of one micro-batch. If the loss is not finite on any process, the whole step is skipped.

        terms: named parts of the loss, so that the message can say which one is to blame.
        """
        if self.group.any(not bool(torch.isfinite(loss.detach()))):
            local = {name for name, term in (terms or {}).items() if not bool(torch.isfinite(term).all())}
            found: set[str] = set().union(*self.group.gather(local))
            self._not_finite |= found or {"loss"}
            loss = loss * math.nan  # makes every gradient of the window NaN, which is what DeepSpeed skips a step for
        self._engine.backward(loss)

    def step(self, step: int) -> tuple[float, int]:
        """Apply the gradients at the end of an accumulation window -> (gradient norm, steps skipped so far)."""
        boundary = self.window_closed = bool(self._engine.is_gradient_accumulation_boundary())
        plain = self._stage == 0 and boundary  # in float32, this mode would apply a non-finite gradient
        norm = self._norm() if plain else None
        before = int(self._engine.skipped_steps)
        with self._nothing_applied() if norm is not None and not math.isfinite(norm) else nullcontext():
            self._engine.step()
        self.window_applied = False
        if boundary:
            if norm is None:
                found = self._engine.get_global_grad_norm()
                norm = math.nan if found is None else float(found)
            self.grad_norm = norm
            left_out = int(self._engine.skipped_steps) > before
            self.window_applied = not (left_out or self._not_finite or not math.isfinite(norm))
            # float16 finds its loss scale by steps that overflow, which are no incident
            if not self.window_applied and (self._not_finite or self.precision != "float16"):
                self._count_skip(step)
        return self.grad_norm, self.skipped

    def _count_skip(self, step: int) -> None:
        self.skipped += 1
        names = ", ".join(sorted(self._not_finite)) or "gradient"
        self._not_finite.clear()
        log.warning("step %d of the %s is skipped: not finite: %s (%d skipped so far; no weight was changed by it)",
                    step, self.name, names, self.skipped)

    def _norm(self) -> float:
        """Gradient norm at stage 0, NaN on every process where one has a gradient that is not finite."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        return math.nan if self.group.any(not math.isfinite(norm)) else norm

    def _nothing_applied(self) -> AbstractContextManager:
        """DeepSpeed's step with its bookkeeping, but without the optimizer's. The other modes skip by themselves."""
        return _without_steps(self.optimizer) if self.precision == "float32" else nullcontext()

    def take_over(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy parameters that were changed in place into the optimizer's own copies, which would undo the change."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in {id(p): p for p in parameters}.values():
            master = self._masters().get(id(parameter))
            if master is not None:
                master.data.copy_(parameter.detach())
            elif self._stage > 0:
                safe_set_full_fp32_param(parameter, parameter.detach().float())

    def _masters(self) -> dict[int, Tensor]:
        """Stage 0 in bfloat16 keeps its float32 weights in the optimizer, where DeepSpeed's own functions do not look."""
        pairs = zip(getattr(self.optimizer, "fp16_groups", []), getattr(self.optimizer, "fp32_groups", []), strict=False)
        return {id(half): full for halves, fulls in pairs for half, full in zip(halves, fulls, strict=True)}

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter in float32 and every buffer, whole, on the CPU. All processes must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        parameters = dict(self.module.named_parameters())
        masters = self._masters()
        for name, tensor in self.module.state_dict().items():
            if name not in parameters:
                state[name] = tensor.detach().cpu().clone()
                continue
            full = safe_get_full_fp32_param(parameters[name])
            full = masters.get(id(parameters[name]), parameters[name]) if full is None else full
            state[name] = full.detach().float().cpu().reshape(_full_shape(parameters[name])).clone()
        return state

    @property
    def _tag(self) -> str:
        return DEEPSPEED_TAG if self.name == MODEL else f"{DEEPSPEED_TAG}-{self.name}"

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's part of a checkpoint below `folder`. All processes must call it."""
        self._engine.save_checkpoint(str(folder), tag=self._tag, client_state=dict(INFO), save_latest=False)

    def load(self, folder: Path, resharded: bool = False) -> None:
        """Read what `save` wrote, strictly. All processes must call it.

        resharded: another number of processes wrote it, so that shards are cut anew.
        """
        if self.group.any(not (folder / self._tag).is_dir()):  # DeepSpeed would assert without a message
            raise RunFailedError(f"{folder / self._tag}: not there for every process; all processes and machines must see "
                                 "the same run folder")
        if resharded and self._stage:  # without sharding, one file holds all
            self._load_resharded(folder)
            return
        self._check_loaded(folder, self._engine.load_checkpoint(str(folder), tag=self._tag)[0])

    def _load_resharded(self, folder: Path) -> None:
        universal = folder.parent / f".universal-{folder.name}.tmp"
        try:
            self.group.first_does(lambda: to_universal(folder / self._tag, universal / self._tag))
            self._engine._config.load_universal_checkpoint = True
            with self._groups_kept():
                self._check_loaded(folder, self._engine.load_checkpoint(str(universal), tag=self._tag)[0])
        finally:
            self._engine._config.load_universal_checkpoint = False
            self.group.barrier()
            self.group.first_does(lambda: shutil.rmtree(universal, ignore_errors=True))

    @contextmanager
    def _groups_kept(self) -> Iterator[None]:
        """At stage 3 DeepSpeed's universal loading gives all groups the first one's options (weight decay!), and all their
        states one count of steps, which each of them then raises."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        kept = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        yield
        for group, options in zip(optimizer.param_groups, kept, strict=True):
            group.update(options)
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def _check_loaded(self, folder: Path, loaded: Any) -> None:
        if self.group.any(loaded is None):
            raise RunFailedError(f"{folder}: DeepSpeed could not read its part of the checkpoint")


@contextmanager
def _without_steps(optimizer: Any) -> Iterator[None]:
    apply = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = apply


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty parameter that knows its shape
