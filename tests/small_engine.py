"""A small module, a plain training loop, and the same under an engine of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config.run import RunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.optim import build_optimizer, lr_at
from training.engine.processes import Processes

STAGES = (0, 1, 2, 3)


class Small(nn.Module):
    """Every kind of tensor: matrices, a gain, biases, an embedding, a buffer, and dropout where it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16, 3, bias=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(self.embedding(ids))))
        return self.last(self.dropout(hidden)) * self.scale.to(hidden.dtype)


def small(seed: int = 0, dropout: float = 0.0) -> Small:
    torch.manual_seed(seed)
    return Small(dropout)


def config(stage: int = 0, **train) -> RunConfig:
    """Learning rates and clipping for which warm-up, clipping and decay all show."""
    return RunConfig.parse({
        "run_dir": "unused", "train": {"steps": 8, "batch_size": 8, **train}, "deepspeed": {"zero_stage": stage},
        "optim": {"lr": 0.02, "warmup_steps": 3, "weight_decay": 0.3, "gradient_clipping": 0.5}}, "test")


def batch(step: int, device: torch.device, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 5, (size, 4), generator=generator)
    return ids.to(device), torch.randn(size, 4, 3, generator=generator).to(device)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def engine_for(module: nn.Module, run: RunConfig, group: Processes, precision: str = "float32") -> Engine:
    return Engine(module, build_optimizer(module, run.optim), run, group, precision)


def train(engine: Engine, run: RunConfig, group: Processes, steps: range) -> list[float]:
    """The loop of training/loop/loop.py without its log -> the loss of every step, averaged over its micro-batches."""
    losses = []
    for step in steps:
        engine.set_lr(lr_at(step, run.train.steps, run.optim))
        total = 0.0
        ids, target = batch(step, group.device)
        for part in zip(ids.chunk(run.train.accumulation), target.chunk(run.train.accumulation), strict=True):
            loss = squared_error(engine(part[0]), part[1])
            total += float(loss.detach())
            engine.backward(loss, step + 1)
            engine.step(step + 1)
        losses.append(total / run.train.accumulation)
    return losses


def plain_train(module: nn.Module, run: RunConfig, group: Processes, steps: range) -> tuple[list[float], list[float]]:
    """The same in PyTorch alone -> losses, gradient norms before clipping."""
    module = module.to(group.device)
    optimizer = build_optimizer(module, run.optim)
    losses, norms = [], []
    for step in steps:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr_at(step, run.train.steps, run.optim)
        ids, target = batch(step, group.device)
        loss = squared_error(module(ids), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), run.optim.gradient_clipping)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name], value.detach().cpu(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def not_differentiable_here(prediction: Tensor) -> Tensor:
    """0, with a gradient that is not a number."""
    return (prediction - prediction.detach()).abs().sqrt().sum()


def with_deepspeed(stage: int, **changes) -> RunConfig:
    run = config(stage).plain()
    return RunConfig.parse({**run, "deepspeed": run["deepspeed"] | changes.pop("deepspeed", {}),
                            "train": run["train"] | changes.pop("train", {})}, "test")
