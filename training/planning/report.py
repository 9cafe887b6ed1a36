"""What a training will take, as numbers: memory of a process by ZeRO stage, steps, arithmetic, hours, disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from inference.memory.sizes import human
from tokenloom_common.errors import UserError
from training.config.seq2seq import Seq2SeqRunConfig
from training.data.tokens.shards import token_dtype
from training.planning.activations import Activations
from training.planning.fits import Change, Fitting, least_memory
from training.planning.plan import Plan, RankMemory, checkpoint_bytes

PARTS = ("parameters", "optimizer", "gradients", "average", "activations", "buffers", "other_models", "process")


@dataclass(frozen=True)
class Machine:
    """What a training is planned for. memory: of a process, None = unknown; peak: FLOPs a second of a GPU, None = unknown."""

    processes: int
    cuda: bool
    name: str
    memory: int | None
    peak: float | None
    mfu: float


@dataclass(frozen=True)
class Report:
    """The estimate; `values` as JSON, `stages` the memory behind it (None = that stage is refused)."""

    values: dict[str, Any]
    stages: dict[int, RankMemory | None]


def report_of(plan: Plan, machine: Machine, rows: int | None) -> Report:
    """Everything about a plan on a machine. UserError for a batch that the processes cannot divide."""
    fitting, change = Fitting(plan, machine.processes, machine.cuda), Change.none(plan.config)
    stages = {stage: fitting.memory(change._replace(stage=stage)) for stage in range(4)}
    own = stages[change.stage]
    assert own is not None, "a config that was read is possible"
    train = plan.config.train
    micro = train.batch_size // (machine.processes * train.accumulation)
    activations = fitting.activations(micro, change.checkpointing)
    pictures = train.steps * train.batch_size
    picture = plan.flops()
    flops = picture * pictures
    seconds = None if machine.peak is None else flops / (machine.peak * machine.mfu * machine.processes)
    values = {
        "parameters": {"trainable": plan.parameters, "fixed_bytes": sum(module.fixed for module in plan.modules)},
        "processes": machine.processes, "device": machine.name, "precision": plan.precision, "micro_batch": micro,
        "accumulation": train.accumulation, "gradient_checkpointing": train.gradient_checkpointing,
        "zero_stage": change.stage, "memory": machine.memory,
        "stages": [_stage(stage, memory, machine) for stage, memory in stages.items()],
        "steps": train.steps, "pictures": pictures, "tokens": pictures * plan.tokens, "rows": rows,
        "epochs": None if not rows else pictures / rows,
        "flops": {"picture": picture, "run": flops}, "mfu": machine.mfu, "peak_flops": machine.peak,
        "hours": None if seconds is None else seconds / 3600,
        "disk": _disk(plan, change.stage, rows), "advice": _advice(fitting, own, activations, machine)}
    return Report(values, stages)


def _stage(stage: int, memory: RankMemory | None, machine: Machine) -> dict[str, Any]:
    if memory is None:
        return {"zero_stage": stage, "possible": False}
    parts = {name: getattr(memory, name) for name in PARTS}
    return {"zero_stage": stage, "possible": True, "bytes": {**parts, "total": memory.total}, "moment": memory.moment,
            "main_memory": memory.host, "fits": None if machine.memory is None else memory.total <= machine.memory}


def _disk(plan: Plan, stage: int, rows: int | None) -> dict[str, Any]:
    """Bytes of files: checkpoints (one more than are kept, while the newest is written), the export, token shards."""
    checkpoint = plan.config.checkpoint
    each, kept = checkpoint_bytes(plan, stage), checkpoint.keep_last + 1
    kept += checkpoint.keep_best
    if checkpoint.keep_every_steps:
        kept += plan.config.train.steps // checkpoint.keep_every_steps
    tokens = 0
    if rows and plan.codebook_size:
        tokens = rows * plan.tokens * token_dtype(plan.codebook_size).itemsize
    export = plan.copy + (plan.beside if isinstance(plan.config, Seq2SeqRunConfig) else 0)  # with its image tokenizer
    return {"checkpoint": each, "checkpoints": kept, "export": export, "token_shards": tokens,
            "total": each * kept + export + tokens}


def _advice(fitting: Fitting, own: RankMemory, activations: Activations, machine: Machine) -> str:
    if machine.memory is None:
        return "memory unknown: give --memory or --gpu"
    change = Change.none(fitting.plan.config)
    if own.total > machine.memory:
        sure = "" if least_memory(own, activations) <= machine.memory else "; the training would refuse to start"
        return f"does not fit: {human(own.total)} of {human(machine.memory)}{sure}; {fitting.remedy(machine.memory)}"
    for stage in range(change.stage):
        less = fitting.memory(change._replace(stage=stage))
        if less is not None and less.total <= machine.memory:
            return f"fits; deepspeed.zero_stage {stage} would too, with fewer messages between processes"
    return "fits"


def require_precision(name: str, peak: float | None, precision: str) -> None:
    """UserError when a GPU that is known has no such precision."""
    if peak is None:
        raise UserError(f"--gpu {name} does not compute in {precision}; set train.precision to float16 or float32")
