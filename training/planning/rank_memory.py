"""The memory of one process of a training, worked out for each ZeRO stage before anything is made.

What stays (parameters, float32 copies, the optimizer's moments) is arithmetic on the parameters' shapes. What comes and goes is
looked at in the moments where most of it is alive: forward and backward, reducing gradients, the optimizer's step, the start,
and a float32 copy for samples and exports; the largest of these decides. Numbers alive in each moment follow the code of
DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py), and are checked against runs in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from inference.memory.meta_device import Alive
from training.config.optim import OptimConfig
from training.engine.optim import OPTIMIZERS, build_optimizer
from training.planning.activations import Activations

Shapes = tuple[tuple[int, ...], ...]

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LARGEST_ALLREDUCE = 500_000_000
"""Numbers that DeepSpeed flattens together at stage 0 (constants.MEMORY_OPT_ALLREDUCE_SIZE)."""
ZERO_DEFAULTS = {"reduce_bucket_size": 500_000_000, "sub_group_size": 1_000_000_000,
                 "stage3_max_live_parameters": 1_000_000_000, "stage3_param_persistence_threshold": 100_000}
"""DeepSpeed's own values of what memory depends on, where its JSON does not say."""
PROCESS = {"cpu": (40 << 20, 80 << 20, 80 << 20, 90 << 20), "cuda": (1 << 30,) * 4}
"""Bytes of a process beyond its tensors, by stage. CPU: what first use of kernels, autograd, gloo and DeepSpeed's modules took
(measured, torch 2.13, DeepSpeed 0.19.8). CUDA: the context, NCCL's buffers, cuBLAS: an assumption, not measured."""
LOW_PRECISION = 16 << 20
"""What first use of a CPU's kernels takes more in bfloat16 and float16 (measured)."""


@dataclass(frozen=True)
class TrainedModule:
    """What memory depends on of a module with its own engine.

    groups: shapes of its trainable parameters, an optimizer's group each; fixed: bytes of frozen parameters and of buffers.
    """

    name: str
    groups: tuple[Shapes, ...]
    fixed: int
    optim: OptimConfig
    precision: str

    @classmethod
    def of(cls, name: str, module: nn.Module, optim: OptimConfig, precision: str) -> TrainedModule:
        """Of a module on the meta device, grouped as its optimizer groups it."""
        groups = tuple(tuple(tuple(p.shape) for p in group["params"]) for group in build_optimizer(module, optim).param_groups)
        frozen = sum(4 * p.numel() for p in module.parameters() if not p.requires_grad)
        return cls(name, groups, frozen + sum(buffer.nbytes for buffer in module.buffers()), optim, precision)

    @property
    def sizes(self) -> list[int]:
        """Numbers of each trainable parameter."""
        return [math.prod(shape) for group in self.groups for shape in group]

    @property
    def trainable(self) -> int:
        """Numbers that learn."""
        return sum(self.sizes)

    @property
    def largest_group(self) -> int:
        """Numbers of the largest of the optimizer's groups."""
        return max(sum(math.prod(shape) for shape in group) for group in self.groups)


@dataclass(frozen=True)
class Layout:
    """How a training is laid out over processes. zero: DeepSpeed's section of that name."""

    stage: int
    processes: int
    accumulation: int
    offload: str = "none"
    cuda: bool = False
    zero: dict[str, Any] = field(default_factory=dict)

    def number(self, name: str, parameters: int) -> int:
        """A size of DeepSpeed's; the trainings make buckets no larger than the model."""
        most = min(ZERO_DEFAULTS[name], parameters) if name == "reduce_bucket_size" else ZERO_DEFAULTS[name]
        return int(self.zero.get(name, most))


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive in one moment beside what always is."""

    name: str
    activations: int = 0
    gradients: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.buffers


@dataclass(frozen=True)
class EngineMemory:
    """Of one engine: what always is there, on the device and (offloaded) in main memory, and its moments."""

    parameters: int
    optimizer: int
    gradients: int
    buffers: int
    offloaded: int
    moments: tuple[Moment, ...]


@lru_cache(maxsize=4096)
def optimizer_bytes(groups: tuple[Shapes, ...], config: OptimConfig, together: bool) -> tuple[int, int]:
    """(state, most bytes that a step takes beside it) of an optimizer over float32 parameters, by running its step twice on the
    meta device. together: all parameters at a time, as torch does on CUDA, and not one after another."""
    made = [[nn.Parameter(torch.empty(shape, device="meta")) for shape in group] for group in groups]
    optimizer = OPTIMIZERS[config.name]([{"params": group, "weight_decay": 0.1} for group in made], config)
    for parameters in optimizer.param_groups:
        if "foreach" in parameters:
            parameters["foreach"] = together
    holder = nn.ParameterList([parameter for group in made for parameter in group])
    for parameter in holder:
        parameter.grad = torch.empty_like(parameter)
    with Alive(holder) as alive:
        optimizer.step()
        state = alive.peak = alive.now
        optimizer.step()
    return state, alive.peak - state


def engine_memory(module: TrainedModule, layout: Layout, activations: Activations) -> EngineMemory:
    """What an engine needs; `activations` of a micro-batch, without peaks for a module that runs inside another's trace."""
    sharded = [_unsharded, _sharded, _sharded, _all_sharded][layout.stage]
    memory = sharded(module, layout, activations, NUMBER_BYTES[module.precision])
    return replace(memory, parameters=memory.parameters + module.fixed)


def _unsharded(module: TrainedModule, layout: Layout, activations: Activations, number: int) -> EngineMemory:
    count, sizes = module.trainable, module.sizes
    state, temporary = optimizer_bytes(module.groups, module.optim, layout.cuda)
    copies = 0 if number == 4 else 4 * count  # gradients, and for good: parameters
    kept = number * count if layout.accumulation > 1 else 0
    alive, held = activations.worst(lambda done: kept or number * done)
    flat = number * min(count, LARGEST_ALLREDUCE + max(sizes))
    return EngineMemory(number * count, copies + state, 0, 0, 0, (
        Moment("forward and backward", alive, held),
        Moment("reducing gradients", 0, number * count, flat),
        Moment("optimizer step", 0, number * count, copies + temporary),
        Moment("start", 0, 0, max(0, _first(layout, number) * count - number * count - copies - state))))


def _sharded(module: TrainedModule, layout: Layout, activations: Activations, number: int) -> EngineMemory:
    """Stages 1 and 2."""
    count, share = module.trainable, 1 / layout.processes
    bucket = layout.number("reduce_bucket_size", count)
    shard = math.ceil(count * share)
    state, temporary, step = _flat_step(module, layout, module.largest_group * share, number)
    offloads = layout.offload != "none"
    own, host = (0, 0) if offloads else (4 * shard + state, 0)
    if offloads:  # float32 copies and gradients, moments, weights on their way, gradients that add up
        host = 8 * shard + state + number * shard * (2 if layout.accumulation > 1 else 1)
        temporary = step = 0
    flat = number * bucket if layout.processes > 1 else 0  # several shards' gradients in one message
    added = number * shard if layout.accumulation > 1 and not offloads else 0
    partition = 0 if offloads else number * min(count, shard + max(module.sizes))  # the largest may begin in another's shard
    if layout.stage == 1:
        kept = number * count if layout.accumulation > 1 else 0
        # an empty bucket is no memory on a CPU until it is written to
        alive, held = activations.worst(lambda done: kept or number * done)
        backward = Moment("forward and backward", alive, held, number * bucket if layout.cuda else 0)
        reducing = Moment("reducing gradients", 0, number * count, max(flat, partition))
    else:
        early = partition if bucket < count else 0
        alive, held = activations.worst(lambda done: number * (bucket if layout.cuda else min(done, bucket)))
        backward = Moment("forward and backward", alive, added + early, held + (flat if early else 0))
        reducing = Moment("reducing gradients", 0, added + early, number * bucket + max(flat, partition - early))
    # weights are made one vector, in main memory where a GPU has no room for both
    start = max(_first(layout, number) * count, (1 if layout.cuda else 2) * number * count, number * count + 8 * shard)
    return EngineMemory(number * count, own, 0, 0, host, (
        backward, reducing, Moment("optimizer step", 0, partition, step + temporary),
        Moment("start", 0, 0, max(0, start - number * count - own))))


def _all_sharded(module: TrainedModule, layout: Layout, activations: Activations, number: int) -> EngineMemory:
    """Stage 3."""
    count = module.trainable
    shard = math.ceil(count / layout.processes)
    bucket = layout.number("reduce_bucket_size", count)
    small = sum(size for size in module.sizes if size <= layout.number("stage3_param_persistence_threshold", count))
    live = max(small, min(count, layout.number("stage3_max_live_parameters", count)))
    gathered = number * live if layout.processes > 1 else 0
    largest = max(module.sizes) / layout.processes
    group = min(module.largest_group / layout.processes, layout.number("sub_group_size", count) + largest)
    state, temporary, step = _flat_step(module, layout, group, number)
    offloads = layout.offload != "none"
    parameters = 0 if layout.offload == "parameters" else number * shard
    own, kept = (0, 0) if offloads else (4 * shard + state, number * shard)
    host = (8 * shard + state + number * shard if offloads else 0) + (number * shard - parameters)
    if offloads:
        temporary = step = 0
    alive, _ = activations.worst()
    copies = 1 if layout.cuda else 2  # gloo keeps one of its own
    return EngineMemory(parameters, own, kept, number * bucket, host, (
        Moment("forward and backward", alive, 0, gathered),
        Moment("reducing gradients", 0, 0, gathered + copies * number * bucket),
        Moment("optimizer step", 0, 0, step + temporary),
        Moment("start", 0, 0, max(0, _first(layout, number) * count - parameters - own - kept))))


def _first(layout: Layout, number: int) -> int:
    """Bytes a number of a module when DeepSpeed takes it: float32, which it rounds before it moves it to a GPU."""
    return number if layout.cuda else 4


def _flat_step(module: TrainedModule, layout: Layout, group: float, number: int) -> tuple[int, int, int]:
    """(state of all shards of this process, temporaries of a step, float32 gradients of it) with `group` numbers at a time."""
    flat = tuple(((math.ceil(sum(math.prod(shape) for shape in shapes) / layout.processes),),) for shapes in module.groups)
    state = optimizer_bytes(flat, module.optim, layout.cuda)[0]
    numbers = math.ceil(group)
    temporary = optimizer_bytes((((numbers,),),), module.optim, layout.cuda)[1]
    if number < 4:  # they are flattened before they become float32
        temporary = max(temporary, number * numbers)
    return state, temporary, 4 * numbers
