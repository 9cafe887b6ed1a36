"""DeepSpeed's JSON: derived from our config, with the keys that a user's own file adds.

DeepSpeed 0.19 accepts a misspelt top-level key in silence, so every key of a user's file is checked
here, against the keys that mean something in our runs. Its own models of the sections would accept
more: deprecated keys, and keys that do nothing here. "auto" is the value of our config, or
DeepSpeed's default where ours has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError, nearest_name
from tokenloom_common.text_files import read_text_file
from training.config.optim import OptimConfig
from training.config.run import RunConfig

LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's default
AUTO = "auto"


def _section(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


KEYS: dict[str, Any] = {
    **_section(
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "communication_data_type", "prescale_gradients",
        "gradient_predivide_factor", "disable_allgather", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
        "memory_breakdown", "dump_state", "log_level"),
    "bf16": _section("enabled", "immediate_grad_update", "check_grad_overflow",
                     "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "fp16": _section("enabled", "loss_scale", "initial_scale_power", "loss_scale_window",
                     "hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    "data_types": _section("grad_accum_dtype"),
    "comms_logger": _section("enabled", "prof_all", "prof_ops", "verbose", "debug"),
    "flops_profiler": _section("enabled", "recompute_fwd_factor", "profile_step", "module_depth",
                               "top_modules", "detailed", "output_file"),
    # reading and writing what is offloaded to disk (device nvme)
    "aio": _section("block_size", "queue_depth", "intra_op_parallelism", "single_submit",
                    "overlap_events", "use_gds"),
    "zero_optimization": {
        **_section(
            "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size",
            "overlap_comm", "sub_group_size", "ignore_unused_parameters", "round_robin_gradients",
            "zero_hpz_partition_size", "zero_quantized_weights",
            "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
            "memory_efficient_linear", "log_trace_cache_warnings", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
            "stage3_max_live_parameters", "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
        "offload_param": _section("device", "nvme_path", "buffer_count", "buffer_size",
                                  "max_in_cpu", "pin_memory"),
        "offload_optimizer": _section("device", "nvme_path", "buffer_count", "pin_memory",
                                      "pipeline_read", "pipeline_write", "fast_init", "ratio"),
    },
}
"""Every key that a user's file may have, those of sections below them."""

_UNUSED = "it is not part of these runs"
ELSEWHERE = {
    "optimizer": "say optim.name, optim.lr, optim.betas, optim.weight_decay",
    "scheduler": "say optim.schedule and optim.warmup_steps",
    "activation_checkpointing": "say train.gradient_checkpointing",
    "compile": "say train.compile",
    "torch_autocast": "say train.precision",
    "amp": "say train.precision",
    "tensorboard": "say log.tensorboard",
    "wandb": "say log.wandb",
    "csv_monitor": "RUN/metrics.jsonl is always written",
    "comet": "RUN/metrics.jsonl is always written",
    "checkpoint": "say checkpoint.every_steps, checkpoint.keep_last",
    "elasticity": "DeepSpeed has none any more; a run continues on another number "
                  "of processes by itself",
    "curriculum_learning": _UNUSED,
    "data_efficiency": _UNUSED,
    "compression_training": _UNUSED,
    "pipeline": _UNUSED,
    "dataloader_drop_last": "data order is ours",
    "seed": "say seed",
}
"""Keys of DeepSpeed that mean nothing here, and what to do instead."""

OURS = {
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "train_micro_batch_size_per_gpu": "train.batch_size / (processes x train.accumulation)",
    "gradient_clipping": "optim.gradient_clipping",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload",
    "zero_optimization.offload_param.device": "deepspeed.offload",
}
"""Keys that our config decides -> its name there."""


def deepspeed_json(config: RunConfig, world_size: int, precision: str, parameters: int,
                   optim: OptimConfig | None = None) -> dict[str, Any]:
    """Derive DeepSpeed's JSON for one engine.

    parameters: how many the module has; DeepSpeed's own buckets of 500 million would take 2 GB
    beside the smallest model.
    optim: of this engine, where it is not the run's; a user's file says the run's clipping alone.

    UserError if the batch cannot be divided over processes and accumulation, and for a user's file
    (deepspeed.config) with an unknown key or with another value than ours.
    """
    train, zero = config.train, config.deepspeed
    parts = world_size * train.accumulation
    if train.batch_size % parts:
        raise UserError(f"train.batch_size {train.batch_size} is not divisible by {world_size} "
                        f"processes x train.accumulation {train.accumulation} = {parts}")

    zero_section: dict[str, Any] = {"stage": zero.zero_stage,
                                    "reduce_bucket_size": min(LARGEST_BUCKET, parameters)}
    derived: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // parts,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optim.gradient_clipping,  # left out, DeepSpeed clips at 1.0
        "zero_optimization": zero_section,
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": precision == "float16"},
        "steps_per_print": 1 << 62,  # never: our own log has the numbers
        "wall_clock_breakdown": False,
    }
    if zero.offload != "none":
        zero_section["offload_optimizer"] = {"device": "cpu"}
        # torch's AdamW: DeepSpeed's own would be compiled on first use
        derived["zero_force_ds_cpu_optimizer"] = False
    if zero.offload == "parameters":
        zero_section["offload_param"] = {"device": "cpu"}

    if zero.config is not None:
        derived = with_users_file(derived, Path(zero.config))
    if optim is not None:  # last, since the file's clipping was checked against the run's
        derived["gradient_clipping"] = optim.gradient_clipping
    return derived


def with_users_file(derived: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the keys of a user's JSON to ours. UserError with file and key."""
    if not path.exists():
        raise UserError(f"deepspeed.config: {path}: no such file")
    text = read_text_file(path, f"deepspeed.config: {path}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed.config: {path} is no JSON file that can be read "
                        f"({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path} must hold one object of keys and values, not "
                        f"{type(values).__name__}")

    try:
        _check_keys(values, KEYS, "")
        return _merge(derived, values, "")
    except UserError as error:
        raise UserError(f"deepspeed.config: {path}: {error}") from None


def _check_keys(values: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            if name in ELSEWHERE:
                raise UserError(f"'{name}' means nothing here: {ELSEWHERE[name]}")
            raise UserError(f"unknown key '{name}'{nearest_name(key, known)}")

        section = known[key]
        if section is None and isinstance(value, dict):
            raise UserError(f"'{name}' is a value, not a section of keys")
        if section is not None:
            if not isinstance(value, dict):
                raise UserError(f"'{name}' is a section of keys, not {json.dumps(value)}")
            _check_keys(value, section, f"{name}.")


def _merge(ours: dict[str, Any], values: dict[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            section = _merge(ours.get(key, {}), value, f"{name}.")
            # a section with nothing but "auto" in it asks for nothing, so it is not handed on
            if section or key in ours:
                merged[key] = section
        elif value != AUTO:
            if name in OURS:
                _check_alike(name, value, ours.get(key, _absent(name)))
            merged[key] = value
    return merged


def _check_alike(name: str, value: Any, ours: Any) -> None:
    if value != ours:
        raise UserError(f"'{name}' is {json.dumps(value)}, and {OURS[name]} makes it "
                        f"{json.dumps(ours)}; set the two alike, or write \"auto\" in the file")


def _absent(name: str) -> Any:
    """The value that our config means where its JSON leaves a key out."""
    return "none" if name.endswith(".device") else None
