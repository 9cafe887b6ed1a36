"""The estimate of a planned run: memory by ZeRO stage, steps, arithmetic, hours, disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inference.memory.sizes import human
from tokenloom_common.errors import UserError
from training.config.seq2seq import Seq2SeqRunConfig
from training.data.tokens.shards import token_dtype
from training.planning.activations import Activations
from training.planning.fits import MemoryFit, MemoryOptions, least_memory
from training.planning.plan import Plan
from training.planning.rank_memory import RankMemory, checkpoint_bytes

PARTS = ("parameters", "optimizer", "gradients", "average", "activations", "buffers",
         "other_models", "process")


@dataclass(frozen=True)
class Machine:
    """The devices that a run is planned for.

    memory: of a process, None = unknown; peak: FLOP/s of a GPU, None = unknown; mfu: the share of
    it that is used.
    """

    processes: int
    cuda: bool
    name: str
    memory: int | None
    peak: float | None
    mfu: float


@dataclass(frozen=True)
class Report:
    """The estimate.

    values: as JSON; stages: the memory behind it, None where the config refuses that stage.
    """

    values: dict[str, Any]
    stages: dict[int, RankMemory | None]


def report_of(plan: Plan, machine: Machine, rows: int | None) -> Report:
    """Estimate everything about a plan on a machine.

    rows: of the data, None = unknown. UserError for a batch that the processes cannot divide.
    """
    fit = MemoryFit(plan, machine.processes, machine.cuda)
    options = MemoryOptions.of(plan.config)
    # all four for the table, whichever the config asks for
    stages = {stage: fit.memory(options._replace(stage=stage)) for stage in range(4)}
    own = stages[options.stage]
    assert own is not None, "a config that was read is possible"

    train = plan.config.train
    micro_batch = train.batch_size // (machine.processes * train.accumulation)
    activations = fit.activations(micro_batch, options.checkpointing)

    # the keys below say "picture", as the command's output and its JSON always did
    images = train.steps * train.batch_size
    image_flops = plan.flops()
    flops = image_flops * images
    hours = None
    if machine.peak is not None:
        seconds = flops / (machine.peak * machine.mfu * machine.processes)
        hours = seconds / 3600

    fixed_bytes = sum(module.fixed for module in plan.modules)
    values = {
        "parameters": {"trainable": plan.parameters, "fixed_bytes": fixed_bytes},
        "processes": machine.processes,
        "device": machine.name,
        "precision": plan.precision,
        "micro_batch": micro_batch,
        "accumulation": train.accumulation,
        "gradient_checkpointing": train.gradient_checkpointing,
        "zero_stage": options.stage,
        "memory": machine.memory,
        "stages": [_stage(stage, memory, machine) for stage, memory in stages.items()],
        "steps": train.steps,
        "pictures": images,
        "tokens": images * plan.tokens,
        "rows": rows,
        "epochs": images / rows if rows else None,
        "flops": {"picture": image_flops, "run": flops},
        "mfu": machine.mfu,
        "peak_flops": machine.peak,
        "hours": hours,
        "disk": _disk(plan, options.stage, rows),
        "advice": _advice(fit, own, activations, machine),
    }
    return Report(values, stages)


def _stage(stage: int, memory: RankMemory | None, machine: Machine) -> dict[str, Any]:
    if memory is None:
        return {"zero_stage": stage, "possible": False}
    parts = {name: getattr(memory, name) for name in PARTS}
    fits = None if machine.memory is None else memory.total <= machine.memory
    # "moment" is the phase: keys of the JSON stay as they are
    return {"zero_stage": stage, "possible": True, "bytes": {**parts, "total": memory.total},
            "moment": memory.phase, "main_memory": memory.host, "fits": fits}


def _disk(plan: Plan, stage: int, rows: int | None) -> dict[str, Any]:
    """Bytes of a run's files: checkpoints, the export, token shards."""
    checkpoint = plan.config.checkpoint
    count = checkpoint.keep_last + 1  # one more than are kept, while the newest is written
    count += checkpoint.keep_best
    if checkpoint.keep_every_steps:
        count += plan.config.train.steps // checkpoint.keep_every_steps
    each = checkpoint_bytes(plan, stage)

    token_shards = 0
    if rows and plan.codebook_size:
        # captions and keys beside the tokens are not counted
        token_shards = rows * plan.tokens * token_dtype(plan.codebook_size).itemsize

    export = plan.copy
    if isinstance(plan.config, Seq2SeqRunConfig):  # the model folder has the image tokenizer too
        export += plan.other_models
    total = each * count + export + token_shards
    return {"checkpoint": each, "checkpoints": count, "export": export,
            "token_shards": token_shards, "total": total}


def _advice(fit: MemoryFit, own: RankMemory, activations: Activations, machine: Machine) -> str:
    if machine.memory is None:
        return "memory unknown: give --memory or --gpu"
    if own.total > machine.memory:
        refused = ""
        if least_memory(own, activations) > machine.memory:
            refused = "; the run would refuse to start"
        return (f"does not fit: {human(own.total)} of {human(machine.memory)}{refused}; "
                f"{fit.remedy(machine.memory)}")

    # a lower stage sends fewer messages, so it is faster where it fits
    options = MemoryOptions.of(fit.plan.config)
    for stage in range(options.stage):
        lower = fit.memory(options._replace(stage=stage))
        if lower is not None and lower.total <= machine.memory:
            return (f"fits; deepspeed.zero_stage {stage} would too, "
                    "with fewer messages between processes")
    return "fits"


def require_precision(name: str, peak: float | None, precision: str) -> None:
    """UserError when a GPU that is known has no such precision."""
    if peak is None:
        raise UserError(f"--gpu {name} does not compute in {precision}; set train.precision to "
                        "float16 or float32")
