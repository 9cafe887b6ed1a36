"""Engines: modules that DeepSpeed trains, and their part of a checkpoint.

Everything a training script asks of DeepSpeed goes through here, so that what DeepSpeed 0.19 does
not do by itself is done in one place: its JSON is derived from our config, clipping is always
explicit, a step with a non-finite loss or gradient is skipped in every mode and counted,
checkpoints carry the random state of every rank, and `latest` is ours.
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
from training.engine.launch import import_deepspeed
from training.engine.optim import lr_at
from training.engine.processes import Processes
from training.engine.universal import INFO, to_universal

log = logging.getLogger(__name__)

DEEPSPEED_TAG = "deepspeed"  # folder inside a checkpoint that holds what DeepSpeed itself writes
MODEL = "model"  # name of a run's main engine; a further one (a discriminator) has its own


class Engine:
    """One module under DeepSpeed with its own optimizer."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig,
                 group: Processes, precision: str, optim: OptimConfig | None = None,
                 name: str = MODEL, start_step: int = 0) -> None:
        """optim: of this engine, default the run's; start_step: of the run, where it begins."""
        deepspeed = import_deepspeed()
        self.group = group
        self.precision = precision
        self.name = name
        self.optim = optim or config.optim
        self.start_step = start_step
        self.total_steps = config.train.steps
        self.grad_norm = math.nan
        """Gradient norm of the last step, before clipping."""
        self.skipped = 0
        """Steps skipped since the run began, because a term or gradient was not finite."""
        self.window_closed = False
        """Whether the last micro-batch ended an accumulation window."""
        self.window_applied = False
        """Whether it did, and the optimizer's step changed the weights."""
        self._not_finite: set[str] = set()  # in this accumulation window
        self._stage = config.deepspeed.zero_stage

        # in another precision DeepSpeed rounds the module before it moves it: half as many bytes
        if precision == "float32":
            module = module.to(group.device)

        frozen = [(parameter, parameter.data) for parameter in module.parameters()
                  if not parameter.requires_grad]
        parameters = sum(parameter.numel() for parameter in module.parameters())
        if config.train.compile:
            module.compile()  # in place: names in checkpoints stay as they are

        # the run's batch and stage, but this engine's own clipping
        json = deepspeed_json(config, group.world_size, precision, parameters, self.optim)
        # At stage 0 in bfloat16 DeepSpeed takes a step with gradients of 0, which would count, and
        # decay the weights.
        with _without_steps(optimizer) if self._stage == 0 else nullcontext():
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=json)
        # DeepSpeed rounds frozen weights too, though they have no float32 copy anywhere
        for parameter, original in frozen:
            parameter.data = original.to(group.device)

    @property
    def module(self) -> nn.Module:
        """The module inside."""
        return self._engine.module

    def __call__(self, *inputs: Tensor) -> Any:
        return self._engine(*inputs)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def lr_of(self, step: int) -> float:
        """The learning rate of the run's step 0 .. steps-1; 0 before this engine starts."""
        if step < self.start_step:
            return 0.0
        own_steps = max(1, self.total_steps - self.start_step)
        return lr_at(step - self.start_step, own_steps, self.optim)

    def backward(self, loss: Tensor, step: int, terms: dict[str, Tensor] | None = None) -> None:
        """Accumulate gradients of one micro-batch.

        If the loss is not finite on any process, the whole step is skipped.
        terms: named parts of the loss, so that the message can name the one to blame.
        """
        finite = bool(torch.isfinite(loss.detach()))
        # all processes must decide alike: gradients are averaged, and a single NaN spreads to all
        if self.group.any(not finite):
            self._not_finite |= self._find_not_finite(terms or {}) or {"loss"}
            # makes every gradient of the window NaN, for which DeepSpeed skips the step
            loss = loss * math.nan
        self._engine.backward(loss)

    def _find_not_finite(self, terms: dict[str, Tensor]) -> set[str]:
        """Names of the terms that are not finite on any process."""
        local = {name for name, term in terms.items() if not bool(torch.isfinite(term).all())}
        return set().union(*self.group.gather(local))

    def step(self, step: int) -> tuple[float, int]:
        """Apply the gradients at the end of an accumulation window.

        Returns (gradient norm, steps skipped so far).
        """
        self.window_closed = bool(self._engine.is_gradient_accumulation_boundary())
        self.window_applied = False
        skipped_before = int(self._engine.skipped_steps)

        norm: float | None = None  # DeepSpeed has none at stage 0 in float32
        apply: AbstractContextManager = nullcontext()
        if self._stage == 0 and self.window_closed:
            norm = self._stage_0_norm()
            if not math.isfinite(norm):
                apply = self._nothing_applied()
        with apply:
            self._engine.step()
        if not self.window_closed:
            return self.grad_norm, self.skipped

        if norm is None:
            found = self._engine.get_global_grad_norm()
            norm = math.nan if found is None else float(found)  # inf where gradients overflowed
        self.grad_norm = norm
        left_out = int(self._engine.skipped_steps) > skipped_before
        self.window_applied = math.isfinite(norm) and not left_out and not self._not_finite
        # float16 finds its loss scale by steps that overflow, which are no incident
        if not self.window_applied and (self._not_finite or self.precision != "float16"):
            self._count_skip(step)
        return self.grad_norm, self.skipped

    def _count_skip(self, step: int) -> None:
        self.skipped += 1
        names = ", ".join(sorted(self._not_finite)) or "gradient"
        self._not_finite.clear()
        log.warning("step %d of the %s is skipped: not finite: %s (%d skipped so far; no weight "
                    "was changed by it)",
                    step, self.name, names, self.skipped)

    def _stage_0_norm(self) -> float:
        """Gradient norm at stage 0; NaN on every process if one has a non-finite gradient."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        return math.nan if self.group.any(not math.isfinite(norm)) else norm

    def _nothing_applied(self) -> AbstractContextManager:
        """Let DeepSpeed do its bookkeeping of a step, but not the optimizer's.

        In float32 stage 0 would apply a non-finite gradient; the other modes skip by themselves.
        """
        return _without_steps(self.optimizer) if self.precision == "float32" else nullcontext()

    def take_over(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy parameters that were changed in place into the optimizer's own copies.

        The next step would undo the change otherwise.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        masters = self._masters()
        # by id: a tied weight is copied once
        for parameter in {id(parameter): parameter for parameter in parameters}.values():
            master = masters.get(id(parameter))
            if master is not None:
                master.data.copy_(parameter.detach())
            elif self._stage > 0:
                safe_set_full_fp32_param(parameter, parameter.detach().float())

    def _masters(self) -> dict[int, Tensor]:
        """The float32 weights of stage 0 in bfloat16, by the id of their parameter.

        They are in the optimizer, where DeepSpeed's own functions do not look.
        """
        masters: dict[int, Tensor] = {}
        low_groups = getattr(self.optimizer, "fp16_groups", [])
        full_groups = getattr(self.optimizer, "fp32_groups", [])
        for low_group, full_group in zip(low_groups, full_groups, strict=False):
            for low, full in zip(low_group, full_group, strict=True):
                masters[id(low)] = full
        return masters

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter in float32 and every buffer, whole, on the CPU.

        All processes must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, Tensor] = {}
        parameters = dict(self.module.named_parameters())
        masters = self._masters()
        for name, tensor in self.module.state_dict().items():  # the export's names and order
            parameter = parameters.get(name)
            if parameter is None:  # a buffer
                state[name] = tensor.detach().cpu().clone()
                continue
            full = safe_get_full_fp32_param(parameter)
            if full is None:
                full = masters.get(id(parameter), parameter)
            state[name] = full.detach().float().cpu().reshape(_full_shape(parameter)).clone()
        return state

    @property
    def _tag(self) -> str:
        return DEEPSPEED_TAG if self.name == MODEL else f"{DEEPSPEED_TAG}-{self.name}"

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's part of a checkpoint below `folder`. All processes must call it."""
        # no `latest` of DeepSpeed's: rank 0 writes it before the other ranks' files are there
        self._engine.save_checkpoint(str(folder), tag=self._tag, client_state=dict(INFO),
                                     save_latest=False)

    def load(self, folder: Path, resharded: bool = False) -> None:
        """Read what `save` wrote, strictly. All processes must call it.

        resharded: another number of processes wrote it, so that shards are cut anew.
        """
        # where it is missing, DeepSpeed would assert without a message
        if self.group.any(not (folder / self._tag).is_dir()):
            raise RunFailedError(f"{folder / self._tag}: not there for every process; all "
                                 "processes and machines must see the same run folder")
        if resharded and self._stage:  # without sharding, one file holds all
            self._load_resharded(folder)
        else:
            self._load(folder, folder)

    def _load(self, folder: Path, named: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=self._tag)
        if self.group.any(loaded is None):
            raise RunFailedError(f"{named}: DeepSpeed could not read its part of the checkpoint")

    def _load_resharded(self, folder: Path) -> None:
        # beside the checkpoint, which stays as it is: a universal copy is for this load alone
        universal = folder.parent / f".universal-{folder.name}.tmp"
        try:
            self.group.first_does(lambda: to_universal(folder / self._tag, universal / self._tag))
            self._engine._config.load_universal_checkpoint = True
            with self._groups_kept():
                self._load(universal, folder)
        finally:
            self._engine._config.load_universal_checkpoint = False
            self.group.barrier()  # the others may still be reading
            self.group.first_does(lambda: shutil.rmtree(universal, ignore_errors=True))

    @contextmanager
    def _groups_kept(self) -> Iterator[None]:
        """Undo two faults of DeepSpeed's universal loading at stage 3.

        It gives all groups the first one's options (weight decay!), and all their states one count
        of steps, which each of them then raises.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside ZeRO's
        kept = []
        for group in optimizer.param_groups:
            kept.append({name: value for name, value in group.items() if name != "params"})
        yield
        for group, options in zip(optimizer.param_groups, kept, strict=True):
            group.update(options)
        for state in optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


@contextmanager
def _without_steps(optimizer: Any) -> Iterator[None]:
    """Make the optimizer's step do nothing while this is open."""
    apply = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = apply


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    # ZeRO-3 leaves an empty parameter that knows its shape
    return getattr(parameter, "ds_shape", parameter.shape)
