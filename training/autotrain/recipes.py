"""The scripts' configs that choices lead to, with the user's own keys over them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenloom_common.errors import UserError
from training.autotrain.choices import LARGE_WIDTH, WIDTHS, Choices
from training.autotrain.facts import MachineFacts
from training.config.loading import load_config
from training.config.run import RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig

STAGES: dict[str, type[RunConfig]] = {
    "tokenizer": TokenizerRunConfig,
    "transformer": Seq2SeqRunConfig,
}
"""Stage -> config of its script; its keys are given as --STAGE.KEY."""
STAND_INS = {
    "tokenizer": ["--run_dir", "RUN", "--data.path", "DATA"],
    "transformer": ["--run_dir", "RUN", "--data.path", "TOKENS", "--image_tokenizer", "TOKENIZER"],
}
LOG_SECONDS = 3.0  # between lines of metrics.jsonl, by which the time is watched
CHECKPOINT_SECONDS = 60.0


def check_overrides(overrides: dict[str, list[str]]) -> None:
    """UserError, naming the stage, for a key or a value that its script would refuse."""
    for stage in STAGES:
        read_stage(stage, STAND_INS[stage], overrides)


def read_stage(stage: str, arguments: Sequence[str], overrides: dict[str, list[str]],
               recipe: dict[str, Any] | None = None) -> Any:
    """Read the config of a stage: recipe < its script's arguments < the user's keys."""
    own = overrides.get(stage, [])
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{stage}.yaml"
            file.write_text(yaml.safe_dump(recipe or {}), encoding="utf-8")
            options = ["--config", str(file), *arguments, *own]
            return load_config(STAGES[stage], options, stage, "")
    except UserError as error:
        if own:
            message = str(error).replace("--", f"--{stage}.", 1)
            prefix = "" if message != str(error) else f"--{stage}.*: "
            raise UserError(f"{prefix}{message}") from None
        raise


def tokenizer_values(choices: Choices, machine: MachineFacts) -> dict[str, Any]:
    """Return the recipe of the image tokenizer, without places."""
    on_gpu = machine.gpus > 0
    values: dict[str, Any] = {
        "loss": {"l1_weight": 0.0, "l2_weight": 4.0},
        "train": {"steps": choices.tokenizer_steps, "batch_size": choices.tokenizer_batch,
                  "precision": "float32", "sample_every": 0, "weight_ema": 0.99},
        "optim": {"lr": _tokenizer_rate(choices, on_gpu), "betas": [0.9, 0.99],
                  "weight_decay": 0.0, "final_lr_ratio": 0.02},
        "data": {"horizontal_flip": choices.flip, "workers": 4 if on_gpu else 0},
    }
    if choices.shape.start is not None:
        values["init_from"] = choices.shape.start
        if choices.shape.start_width is not None:
            values["train"]["trained_part"] = "decoder"  # its transformer knows its codes
    else:
        values["model"] = _vqgan(choices, on_gpu)
    _add_pace(values, choices.times.picture_seconds * choices.tokenizer_batch)
    return values


def _tokenizer_rate(choices: Choices, on_gpu: bool) -> float:
    if choices.shape.start is not None:
        return 0.0003 if on_gpu else 0.001
    return 0.0004 if on_gpu else 0.003


def _vqgan(choices: Choices, on_gpu: bool) -> dict[str, Any]:
    shape = choices.shape
    levels = {4: [1, 2, 4], 8: [1, 2, 4, 8], 16: [1, 1, 2, 4, 8]}
    if on_gpu:
        levels = {4: [1, 2, 4], 8: [1, 2, 2, 4], 16: [1, 1, 2, 2, 4]}
    return {
        "kind": "vqgan", "resolution": shape.size, "channels": choices.channels,
        "channel_multipliers": levels[shape.patch], "num_res_blocks": 2 if on_gpu else 1,
        "attention_resolutions": [], "mid_attention": False, "norm_groups": 8,
        "z_channels": 128 if on_gpu else 64, "embed_dim": 8,
        "codebook_size": choices.codebook_size,
        "quantizer": {"kind": "vq", "ema_decay": _codebook_decay(choices)},
    }


def _codebook_decay(choices: Choices) -> float:
    """Return the decay of the codes' moving average: over some 20 latents of an average code.

    0.9 follows the encoder quickly, but with a large codebook and a small batch codes seem unused
    and restart all the time: 64 px, f8, 4,096 codes, batch 8 lost 2 dB.
    """
    latents = choices.tokenizer_batch * choices.shape.tokens / choices.codebook_size  # per code
    return round(min(0.99, max(0.9, 1 - latents / 20)), 3)


def transformer_values(choices: Choices, code_tables: bool, keep_best: bool) -> dict[str, Any]:
    """Return the recipe of the transformer, without places.

    code_tables: whether its tables of codes could begin as the tokenizer's codebook.
    keep_best: whether the checkpoint that does best on held-out images is kept.
    """
    starts = choices.shape.start_width is not None
    values: dict[str, Any] = {
        "train": {"steps": choices.steps, "batch_size": choices.batch, "sample_every": 0,
                  "weight_ema": 0.99 if choices.steps >= 1000 else 0.0},
        "optim": {"lr": _transformer_rate(choices), "weight_decay": 0.05},
        "caption_dropout": 0.1,
        # without it the model knows pictures by their first tokens and not by their captions
        "token_corruption": 0.5,
        "code_tables_from_codebook": code_tables and not starts,
        "sample_guidance": choices.guidance, "sample_temperature": choices.temperature,
        "sample_top_k": choices.top_k,
    }
    if starts:
        values["init_from"] = choices.shape.start
        values["model"] = {"dropout": choices.dropout}
    else:
        encoder, decoder = WIDTHS[choices.width]
        values["text"] = {"vocab_size": choices.vocabulary, "text_length": choices.text_length}
        values["model"] = {
            "kind": "encoder_decoder", "width": choices.width, "heads": choices.width // 64,
            "head_dim": 64, "encoder_layers": encoder, "decoder_layers": decoder,
            "dropout": choices.dropout}
    seconds_per_step = choices.times.row_seconds * choices.batch
    _add_pace(values, seconds_per_step)
    if keep_best:
        # a look at the held-out rows, forward alone, takes no more than a twentieth of the time
        measure_seconds = choices.held_out * choices.times.row_seconds / 3
        every = max(CHECKPOINT_SECONDS, 20 * measure_seconds)
        values["checkpoint"] |= {"every_steps": round(every / seconds_per_step), "keep_best": True}
        values["train"]["validate_every"] = values["checkpoint"]["every_steps"]
    return values


def _transformer_rate(choices: Choices) -> float:
    if choices.shape.start_width is not None:
        return 0.0005
    return 0.0005 if choices.width == LARGE_WIDTH else 0.002


def _add_pace(values: dict[str, Any], seconds_per_step: float) -> None:
    """Set what is counted in steps and meant in seconds: logging, checkpoints, warm-up."""
    train, steps = values["train"], values["train"]["steps"]
    train["log_every"] = max(1, round(LOG_SECONDS / seconds_per_step))
    every = max(10, round(CHECKPOINT_SECONDS / seconds_per_step))
    values["checkpoint"] = {"every_steps": every, "keep_last": 1}
    values["optim"]["warmup_steps"] = min(100, steps // 10)


def check_size_of(config: Any, size: int, folder: Path | str) -> None:
    """UserError where the user's model has another image size than the chosen one."""
    if config.model.resolution != size:
        raise UserError(f"--tokenizer.model: its resolution is {config.model.resolution}, and "
                        f"{size} px was chosen for {folder}; give --size")
