"""The memory of one engine in one process, worked out for each ZeRO stage before it is made.

What stays (parameters, float32 copies, the optimizer's moments) is arithmetic on the parameters'
shapes. What comes and goes is looked at in the phases where most of it is alive: forward and
backward, reducing gradients, the optimizer's step, the start, and a float32 copy for samples and
exports; the largest of these decides. The numbers alive in each phase follow the code of DeepSpeed
0.19 (runtime/zero/stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py), and are checked against
runs in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from training.planning.activations import Activations
from training.planning.trained_module import (
    FLOAT32_BYTES,
    NUMBER_BYTES,
    TrainedModule,
    optimizer_bytes,
)

LARGEST_ALLREDUCE = 500_000_000
"""Numbers that DeepSpeed flattens together at stage 0 (constants.MEMORY_OPT_ALLREDUCE_SIZE)."""
ZERO_DEFAULTS = {"reduce_bucket_size": 500_000_000, "sub_group_size": 1_000_000_000,
                 "stage3_max_live_parameters": 1_000_000_000,
                 "stage3_param_persistence_threshold": 100_000}
"""DeepSpeed's defaults of the sizes that memory depends on."""
FORWARD_BACKWARD = "forward and backward"
REDUCING = "reducing gradients"
OPTIMIZER_STEP = "optimizer step"
START = "start"

# below, `number` is the bytes of one number in the module's precision; counts are in numbers


@dataclass(frozen=True)
class Sharding:
    """How a run is spread over processes. zero: DeepSpeed's section zero_optimization."""

    stage: int
    processes: int
    accumulation: int
    offload: str = "none"
    cuda: bool = False
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def offloads(self) -> bool:
        """Whether optimizer state, or more, is kept in main memory."""
        return self.offload != "none"

    def zero_size(self, name: str, parameters: int) -> int:
        """A size of DeepSpeed's section, in numbers, or its default."""
        default = ZERO_DEFAULTS[name]
        if name == "reduce_bucket_size":  # deepspeed_json makes buckets no larger than the model
            default = min(default, parameters)
        return int(self.zero.get(name, default))


@dataclass(frozen=True)
class Phase:
    """Bytes that are alive in one phase of a step, beside those that always are."""

    name: str
    activations: int = 0
    gradients: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of its bytes."""
        return self.activations + self.gradients + self.buffers


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one engine: those that are always there, and those of each phase.

    offloaded: in main memory; all others on the device.
    """

    parameters: int
    optimizer: int
    gradients: int
    buffers: int
    offloaded: int
    phases: tuple[Phase, ...]


def engine_memory(module: TrainedModule, sharding: Sharding, activations: Activations
                  ) -> EngineMemory:
    """Work out the bytes that an engine needs.

    activations: of a micro-batch; without peaks for a module that runs inside another's trace.
    """
    by_stage = (_unsharded, _sharded, _sharded, _all_sharded)
    memory = by_stage[sharding.stage](module, sharding, activations)
    return replace(memory, parameters=memory.parameters + module.fixed)


def _unsharded(module: TrainedModule, sharding: Sharding, activations: Activations) -> EngineMemory:
    """Stage 0."""
    number = NUMBER_BYTES[module.precision]
    count = module.trainable
    weights = gradients = number * count
    state, temporary = optimizer_bytes(module.groups, module.optim, sharding.cuda)

    # in low precision: float32 gradients during a step, and float32 weights for good
    copies = 0 if module.precision == "float32" else FLOAT32_BYTES * count
    own = copies + state

    # gradients that add up are whole from the first micro-batch on
    accumulated = gradients if sharding.accumulation > 1 else 0
    alive, held = activations.worst(lambda done: accumulated or number * done)
    # a message is sent once it is full, so the last parameter in it may go beyond
    flat = number * min(count, LARGEST_ALLREDUCE + max(module.sizes))
    # before DeepSpeed's copies are there, the float32 module may be larger than all that stays
    start = _first_bytes(sharding, number) * count - weights - own
    return EngineMemory(weights, own, 0, 0, 0, (
        Phase(FORWARD_BACKWARD, alive, held),
        Phase(REDUCING, 0, gradients, flat),
        Phase(OPTIMIZER_STEP, 0, gradients, copies + temporary),
        Phase(START, 0, 0, max(0, start))))


def _sharded(module: TrainedModule, sharding: Sharding, activations: Activations) -> EngineMemory:
    """Stages 1 and 2: every process has all weights, and its shard of the optimizer's state."""
    number = NUMBER_BYTES[module.precision]
    count = module.trainable
    weights = number * count
    shard = math.ceil(count * (1 / sharding.processes))
    bucket = sharding.zero_size("reduce_bucket_size", count)
    accumulates = sharding.accumulation > 1

    largest_group = max(module.group_sizes) * (1 / sharding.processes)
    flat_step = _flat_step(module, sharding, largest_group)
    if sharding.offloads:
        own = step = partition = added = 0  # the step runs in main memory, on what is there
        # float32 weights and gradients, moments, weights on their way, gradients that add up
        offloaded = 2 * FLOAT32_BYTES * shard + flat_step.state
        offloaded += number * shard * (2 if accumulates else 1)
    else:
        own = FLOAT32_BYTES * shard + flat_step.state
        step = flat_step.gradients + flat_step.temporary
        # the largest parameter may begin in another process's shard
        partition = number * min(count, shard + max(module.sizes))
        added = number * shard if accumulates else 0
        offloaded = 0

    # several shards' gradients go in one message
    flat = number * bucket if sharding.processes > 1 else 0
    if sharding.stage == 1:
        accumulated = number * count if accumulates else 0
        alive, held = activations.worst(lambda done: accumulated or number * done)
        # an empty bucket is no memory on a CPU until it is written to
        backward = Phase(FORWARD_BACKWARD, alive, held, number * bucket if sharding.cuda else 0)
        reducing = Phase(REDUCING, 0, number * count, max(flat, partition))
    else:
        reduces_early = bucket < count  # a full bucket is reduced during backward
        early = partition if reduces_early else 0
        alive, held = activations.worst(
            lambda done: number * (bucket if sharding.cuda else min(done, bucket)))
        messages = flat if reduces_early else 0
        backward = Phase(FORWARD_BACKWARD, alive, added + early, held + messages)
        reducing = Phase(REDUCING, 0, added + early, number * bucket + max(flat, partition - early))

    # weights are made one vector, in main memory where a GPU has no room for both
    vectors = 1 if sharding.cuda else 2
    start = max(_first_bytes(sharding, number) * count, vectors * weights,
                weights + 2 * FLOAT32_BYTES * shard)
    return EngineMemory(weights, own, 0, 0, offloaded, (
        backward, reducing, Phase(OPTIMIZER_STEP, 0, partition, step),
        Phase(START, 0, 0, max(0, start - weights - own))))


def _all_sharded(module: TrainedModule, sharding: Sharding, activations: Activations
                 ) -> EngineMemory:
    """Stage 3: weights are sharded too, and gathered layer by layer."""
    number = NUMBER_BYTES[module.precision]
    count = module.trainable
    shard = math.ceil(count / sharding.processes)
    bucket = sharding.zero_size("reduce_bucket_size", count)

    # parameters below the threshold are never let go
    threshold = sharding.zero_size("stage3_param_persistence_threshold", count)
    persistent = sum(size for size in module.sizes if size <= threshold)
    most_live = min(count, sharding.zero_size("stage3_max_live_parameters", count))
    gathered = number * max(persistent, most_live) if sharding.processes > 1 else 0

    # a sub-group ends after the parameter that fills it
    largest = max(module.sizes) / sharding.processes
    group = min(max(module.group_sizes) / sharding.processes,
                sharding.zero_size("sub_group_size", count) + largest)
    flat_step = _flat_step(module, sharding, group)

    weights = 0 if sharding.offload == "parameters" else number * shard
    offloaded = number * shard - weights
    if sharding.offloads:
        own = gradients = step = 0
        offloaded += 2 * FLOAT32_BYTES * shard + flat_step.state + number * shard
    else:
        own = FLOAT32_BYTES * shard + flat_step.state
        gradients = number * shard
        step = flat_step.gradients + flat_step.temporary

    alive, _ = activations.worst()  # a gradient leaves for its shard as soon as it is complete
    bucket_copies = 1 if sharding.cuda else 2  # gloo keeps one of its own
    start = _first_bytes(sharding, number) * count - weights - own - gradients
    return EngineMemory(weights, own, gradients, number * bucket, offloaded, (
        Phase(FORWARD_BACKWARD, alive, 0, gathered),
        Phase(REDUCING, 0, 0, gathered + bucket_copies * number * bucket),
        Phase(OPTIMIZER_STEP, 0, 0, step),
        Phase(START, 0, 0, max(0, start))))


def _first_bytes(sharding: Sharding, number: int) -> int:
    """Bytes per number of a module when DeepSpeed takes it.

    DeepSpeed rounds the float32 weights before it moves them to a GPU.
    """
    return number if sharding.cuda else FLOAT32_BYTES


class _FlatStep(NamedTuple):
    """Bytes of an optimizer over flat shards: state, a step's temporaries and float32 gradients."""

    state: int
    temporary: int
    gradients: int


def _flat_step(module: TrainedModule, sharding: Sharding, group: float) -> _FlatStep:
    """Measure this process's optimizer, whose step takes `group` numbers at a time."""
    # a shard is one vector per group, whatever the shapes of its parameters
    shards = [math.ceil(size / sharding.processes) for size in module.group_sizes]
    flat_groups = tuple(((shard,),) for shard in shards)
    state, _ = optimizer_bytes(flat_groups, module.optim, sharding.cuda)

    at_once = math.ceil(group)
    _, temporary = optimizer_bytes((((at_once,),),), module.optim, sharding.cuda)
    if module.precision != "float32":  # gradients are flattened before they become float32
        temporary = max(temporary, NUMBER_BYTES[module.precision] * at_once)
    return _FlatStep(state, temporary, FLOAT32_BYTES * at_once)
