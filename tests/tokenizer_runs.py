"""Small runs of train_tokenizer in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom_common.config import merge
from training.config.tokenizer import TokenizerRunConfig
from training.data.builders.shapes import build_shapes
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.train_tokenizer import TokenizerTraining

MODEL = {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1,
         "norm_groups": 4, "attention_resolutions": [], "mid_attention": False, "z_channels": 8,
         "embed_dim": 3, "codebook_size": 60, "quantizer": {"kind": "fsq", "levels": [5, 4, 3]}}
VQ = {"embed_dim": 4, "codebook_size": 16, "quantizer": {"kind": "vq", "ema_decay": 0.9}}
ADVERSARIAL = {"weight": 0.3, "start_step": 1, "r1_weight": 0.5, "r1_every": 2,
               "discriminator": {"channels": 8, "layers": 1, "norm": "group"}}


def make_data(folder: Path) -> Path:
    """Shapes of 16 px."""
    build_shapes(folder, size=16, num_scenes=40, seed=0)
    return folder


def config(data: Path, run_dir: Path, **changes: Any) -> TokenizerRunConfig:
    base = {"data": {"path": str(data)}, "run_dir": str(run_dir), "model": MODEL,
            "train": {"steps": 4, "batch_size": 8, "precision": "float32", "log_every": 1,
                      "sample_every": 0},
            "optim": {"lr": 0.01, "warmup_steps": 2, "weight_decay": 0.1},
            "discriminator_optim": {"lr": 0.01, "gradient_clipping": 0.5},
            "checkpoint": {"every_steps": 0}}
    return TokenizerRunConfig.parse(merge(base, changes), "test")


def train(run: TokenizerRunConfig, group: Processes) -> TokenizerTraining:
    training = TokenizerTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


def discriminator_state(training: TokenizerTraining) -> dict[str, Tensor]:
    return training.adversary.engine.full_state()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
