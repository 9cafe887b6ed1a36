"""DeepSpeed's JSON: derived from our config, with what a user's own file adds.

DeepSpeed 0.19 accepts a misspelt top-level key in silence, so every key of a user's file is checked here, against the keys that
mean something in our trainings. "auto" is what our config says, or DeepSpeed's default where ours says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError, nearest_name
from training.config.optim import OptimConfig
from training.config.run import RunConfig

LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's default
AUTO = "auto"

_STAGE_3 = ("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
            "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
            "use_all_reduce_for_fetch_params", "allgather_sequential")
KEYS: dict[str, Any] = {
    "train_batch_size": None, "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None,
    "gradient_clipping": None, "communication_data_type": None, "prescale_gradients": None, "gradient_predivide_factor": None,
    "disable_allgather": None, "zero_allow_untested_optimizer": None, "zero_force_ds_cpu_optimizer": None,
    "steps_per_print": None, "wall_clock_breakdown": None, "memory_breakdown": None, "dump_state": None, "log_level": None,
    "bf16": dict.fromkeys(("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads",
                           "bf16_optimizer_states")),
    "fp16": dict.fromkeys(("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
                           "consecutive_hysteresis", "min_loss_scale")),
    "data_types": dict.fromkeys(("grad_accum_dtype",)),
    "comms_logger": dict.fromkeys(("enabled", "prof_all", "prof_ops", "verbose", "debug")),
    "flops_profiler": dict.fromkeys(("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules",
                                     "detailed", "output_file")),
    "aio": dict.fromkeys(("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds")),
    "zero_optimization": {
        **dict.fromkeys(("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
                         "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "overlap_comm",
                         "sub_group_size", "ignore_unused_parameters", "round_robin_gradients", "zero_hpz_partition_size",
                         "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
                         "memory_efficient_linear", "log_trace_cache_warnings")),
        **dict.fromkeys(f"stage3_{name}" for name in _STAGE_3),
        "offload_param": dict.fromkeys(("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory")),
        "offload_optimizer": dict.fromkeys(("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read",
                                            "pipeline_write", "fast_init", "ratio")),
    },
}
"""Every key that a user's file may have, those of sections below them."""

ELSEWHERE = {
    "optimizer": "say optim.name, optim.lr, optim.betas, optim.weight_decay",
    "scheduler": "say optim.schedule and optim.warmup_steps",
    "activation_checkpointing": "say train.gradient_checkpointing",
    "compile": "say train.compile", "torch_autocast": "say train.precision", "amp": "say train.precision",
    "tensorboard": "say log.tensorboard", "wandb": "say log.wandb", "csv_monitor": "RUN/metrics.jsonl is always written",
    "comet": "RUN/metrics.jsonl is always written", "checkpoint": "say checkpoint.every_steps, checkpoint.keep_last",
    "elasticity": "DeepSpeed has none any more; a run continues on another number of processes by itself",
    "curriculum_learning": "it is not part of these trainings", "data_efficiency": "it is not part of these trainings",
    "compression_training": "it is not part of these trainings", "pipeline": "it is not part of these trainings",
    "dataloader_drop_last": "data order is ours", "seed": "say seed"}
"""Keys of DeepSpeed that mean nothing here, and what to do instead."""

OURS = {
    "train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulation",
    "train_micro_batch_size_per_gpu": "train.batch_size / (processes x train.accumulation)",
    "gradient_clipping": "optim.gradient_clipping", "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "train.precision", "fp16.enabled": "train.precision",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload",
    "zero_optimization.offload_param.device": "deepspeed.offload"}
"""Keys that our config decides -> its name there."""


def deepspeed_json(config: RunConfig, world_size: int, precision: str, parameters: int,
                   optim: OptimConfig | None = None) -> dict[str, Any]:
    """DeepSpeed's JSON for one engine. UserError if the batch cannot be divided over processes and accumulation, and for a
    user's file (deepspeed.config) with an unknown key or with another value than ours.

    parameters: how many the module has; DeepSpeed's own buckets of 500 million would take 2 GB beside the smallest model.
    optim: of this engine, where it is not the run's; what a user's file says of clipping is about the run's.
    """
    train, zero = config.train, config.deepspeed
    parts = world_size * train.accumulation
    if train.batch_size % parts:
        raise UserError(f"train.batch_size {train.batch_size} is not divisible by {world_size} processes x "
                        f"train.accumulation {train.accumulation} = {parts}")
    derived: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // parts,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optim.gradient_clipping,
        "zero_optimization": {"stage": zero.zero_stage, "reduce_bucket_size": min(LARGEST_BUCKET, parameters)},
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": precision == "float16"},
        "steps_per_print": 1 << 62,  # our log speaks
        "wall_clock_breakdown": False,
    }
    if zero.offload != "none":
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: DeepSpeed's own would be compiled on first use
    if zero.offload == "parameters":
        derived["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if zero.config is not None:
        derived = with_users_file(derived, Path(zero.config))
    if optim is not None:
        derived["gradient_clipping"] = optim.gradient_clipping
    return derived


def with_users_file(derived: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a user's JSON adds to ours. UserError with file and key."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed.config: {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {path} is no JSON file that can be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path} must hold one object of keys and values, not {type(values).__name__}")
    _check_keys(values, KEYS, "", path)
    return _merged(derived, values, "", path)


def _check_keys(values: dict[str, Any], known: dict[str, Any], prefix: str, path: Path) -> None:
    for key, value in values.items():
        if key not in known:
            if not prefix and key in ELSEWHERE:
                raise UserError(f"deepspeed.config: {path}: '{key}' means nothing here: {ELSEWHERE[key]}")
            raise UserError(f"deepspeed.config: {path}: unknown key '{prefix}{key}'{nearest_name(key, known)}")
        below = known[key]
        if below is None and isinstance(value, dict):
            raise UserError(f"deepspeed.config: {path}: '{prefix}{key}' is a value, not a section of keys")
        if below is not None:
            if not isinstance(value, dict):
                raise UserError(f"deepspeed.config: {path}: '{prefix}{key}' is a section of keys, not {json.dumps(value)}")
            _check_keys(value, below, f"{prefix}{key}.", path)


def _merged(ours: dict[str, Any], values: dict[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            section = _merged(ours.get(key, {}), value, f"{name}.", path)
            if section or key in ours:
                merged[key] = section
        elif value == AUTO:
            continue
        elif name in OURS and value != ours.get(key, _absent(name)):
            raise UserError(f"deepspeed.config: {path}: '{name}' is {json.dumps(value)}, and {OURS[name]} makes it "
                            f"{json.dumps(ours.get(key, _absent(name)))}; set the two alike, or write \"auto\" in the file")
        else:
            merged[key] = value
    return merged


def _absent(name: str) -> Any:
    """What our config means where its JSON leaves a key out."""
    return "none" if name.endswith(".device") else None
