"""The memory of the process that needs most, and the size of a checkpoint, of a planned run."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.run import OFFLOAD_LEAST_STAGE
from training.engine.deepspeed_json import deepspeed_json
from training.planning.activations import Activations
from training.planning.engine_memory import EngineMemory, Phase, Sharding, engine_memory
from training.planning.plan import Plan
from training.planning.trained_module import FLOAT32_BYTES, NUMBER_BYTES

NO_ACTIVATIONS = Activations(((0, 0),))
PROCESS = {"cpu": (40 << 20, 80 << 20, 80 << 20, 90 << 20), "cuda": (1 << 30,) * 4}
"""Bytes of a process beyond its tensors, by stage.

CPU: first use of kernels, autograd, gloo and DeepSpeed's modules (measured, torch 2.13, DeepSpeed
0.19.8). CUDA: the context, NCCL's buffers, cuBLAS: an assumption, not measured.
"""
LOW_PRECISION = 16 << 20
"""Bytes that first use of a CPU's kernels takes more in bfloat16 and float16 (measured)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the process that needs most, in its worst phase.

    The parts sum up to `total`, all of it on the device.
    host: main memory that is needed beside; on a CPU that is the device, and part of `buffers`
    phase: name of the worst phase
    certain: bytes that every phase needs: parameters, optimizer, average, other models, and
        gradients at their fewest
    """

    stage: int
    parameters: int
    optimizer: int
    gradients: int
    average: int
    activations: int
    buffers: int
    other_models: int
    process: int
    host: int
    phase: str
    certain: int

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return (self.parameters + self.optimizer + self.gradients + self.average + self.activations
                + self.buffers + self.other_models + self.process)


def sharding_of(plan: Plan, stage: int, processes: int, cuda: bool) -> Sharding:
    """The plan's own sharding at another stage.

    UserError for a batch that `processes` cannot divide.
    """
    config = plan.config
    deepspeed = config.deepspeed.model_copy(update={"zero_stage": stage})
    config = config.model_copy(update={"deepspeed": deepspeed})
    # the JSON that a run would have, with the sizes that a user's own file sets
    json = deepspeed_json(config, processes, plan.precision, plan.parameters)

    offload = config.deepspeed.offload
    if stage < OFFLOAD_LEAST_STAGE[offload]:  # as if the config were changed with the stage
        offload = "none"
    return Sharding(stage, processes, config.train.accumulation, offload, cuda,
                    zero=dict(json["zero_optimization"]))


def rank_memory(plan: Plan, sharding: Sharding, activations: Activations) -> RankMemory:
    """Work out the memory of the first process, which also has the moving average and samples."""
    engines = [engine_memory(plan.modules[0], sharding, activations)]
    for module in plan.modules[1:]:  # runs inside the first one's trace
        engines.append(engine_memory(module, sharding, NO_ACTIVATIONS))
    kept = _sum(engines)

    # On a CPU, main memory is the device: offloaded state and copies for the export are in it too.
    samples_bytes = plan.copy + plan.sampling
    if sharding.cuda:
        samples_bytes = samples_bytes if plan.uses_copy else 0
        # the float32 model is built in main memory, and copied there for the export
        host = kept.offloaded + 2 * plan.copy
        on_device_too = 0
    else:
        samples_bytes = max(2 * plan.copy, samples_bytes)
        host = on_device_too = kept.offloaded

    phases = [phase for engine in engines for phase in engine.phases]
    phases.append(Phase("samples and export", buffers=samples_bytes))
    worst = max(phases, key=lambda phase: phase.total)  # they follow one another, so no sum

    average = plan.copy if plan.config.train.weight_ema else 0
    fewest_gradients = 0
    if not sharding.offloads:
        sharers = sharding.processes if sharding.stage > 1 else 1  # stage 1 shards no gradients
        fewest_gradients = NUMBER_BYTES[plan.precision] * plan.parameters // sharers
    certain = (kept.parameters + kept.optimizer + average + plan.other_models + fewest_gradients
               + on_device_too)

    return RankMemory(
        sharding.stage,
        parameters=kept.parameters,
        optimizer=kept.optimizer,
        gradients=worst.gradients + kept.gradients,
        average=average,
        activations=worst.activations,
        buffers=worst.buffers + kept.buffers + on_device_too,
        other_models=plan.other_models,
        process=_process_bytes(plan, sharding),
        host=host,
        phase=worst.name,
        certain=certain)


def _process_bytes(plan: Plan, sharding: Sharding) -> int:
    if sharding.cuda:
        return PROCESS["cuda"][sharding.stage]
    low = LOW_PRECISION if plan.precision != "float32" else 0
    return PROCESS["cpu"][sharding.stage] + low


def _sum(engines: list[EngineMemory]) -> EngineMemory:
    return EngineMemory(
        parameters=sum(engine.parameters for engine in engines),
        optimizer=sum(engine.optimizer for engine in engines),
        gradients=sum(engine.gradients for engine in engines),
        buffers=sum(engine.buffers for engine in engines),
        offloaded=sum(engine.offloaded for engine in engines),
        phases=())


def checkpoint_bytes(plan: Plan, stage: int) -> int:
    """Bytes of one checkpoint: DeepSpeed's files of all processes, and the moving average."""
    total = plan.copy if plan.config.train.weight_ema else 0
    for module in plan.modules:
        alone = engine_memory(module, Sharding(0, 1, 1), NO_ACTIVATIONS)
        total += alone.parameters + alone.optimizer
        if stage and module.precision == "float32":  # stages 1 to 3 have float32 twice
            total += FLOAT32_BYTES * module.trainable
        if stage == 3:  # and stage 3 writes one of the two
            total -= NUMBER_BYTES[module.precision] * module.trainable
    return total
