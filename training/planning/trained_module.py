"""A module with its own engine, as far as memory depends on it, and the bytes of its optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from inference.memory.meta_device import Alive
from training.config.optim import OptimConfig
from training.engine.optim import OPTIMIZERS, build_optimizer

Shapes = tuple[tuple[int, ...], ...]

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainedModule:
    """The facts about a module with its own engine that memory depends on.

    groups: shapes of its trainable parameters, one entry per optimizer group; fixed: bytes of
    frozen parameters and of buffers.
    """

    name: str
    groups: tuple[Shapes, ...]
    fixed: int
    optim: OptimConfig
    precision: str

    @classmethod
    def of(cls, name: str, module: nn.Module, optim: OptimConfig, precision: str) -> TrainedModule:
        """Read a module on the meta device, grouped as its optimizer groups it."""
        optimizer = build_optimizer(module, optim)  # its groups alone; no state before a step
        groups = tuple(_shapes(group["params"]) for group in optimizer.param_groups)

        frozen = [p.numel() for p in module.parameters() if not p.requires_grad]
        buffers = [buffer.nbytes for buffer in module.buffers()]
        return cls(name, groups, FLOAT32_BYTES * sum(frozen) + sum(buffers), optim, precision)

    @property
    def sizes(self) -> list[int]:
        """Numbers in each trainable parameter."""
        return [math.prod(shape) for group in self.groups for shape in group]

    @property
    def trainable(self) -> int:
        """Numbers in all trainable parameters."""
        return sum(self.sizes)

    @property
    def group_sizes(self) -> list[int]:
        """Numbers in each optimizer group."""
        return [sum(math.prod(shape) for shape in group) for group in self.groups]


def _shapes(parameters: list[nn.Parameter]) -> Shapes:
    return tuple(tuple(parameter.shape) for parameter in parameters)


@lru_cache(maxsize=4096)  # a remedy asks for the same shards with many combinations of options
def optimizer_bytes(groups: tuple[Shapes, ...], config: OptimConfig, together: bool
                    ) -> tuple[int, int]:
    """Measure an optimizer over float32 parameters by running its step twice on the meta device.

    together: all parameters at a time, as torch does on CUDA, and not one after another.
    Returns (bytes of its state, most bytes that a step takes beside the state).
    """
    parameters = nn.ParameterList()
    optimizer_groups = []
    for group in groups:
        members = [nn.Parameter(torch.empty(shape, device="meta")) for shape in group]
        parameters.extend(members)
        # above 0, or a step would leave its decay out
        optimizer_groups.append({"params": members, "weight_decay": 0.1})
    optimizer = OPTIMIZERS[config.name](optimizer_groups, config)

    # torch decides by device, and "meta" is neither; our Adafactor has no such choice
    for param_group in optimizer.param_groups:
        if "foreach" in param_group:
            param_group["foreach"] = together
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)

    with Alive(parameters) as alive:
        optimizer.step()  # the first step makes the state
        state = alive.peak = alive.now
        optimizer.step()  # the second one has what every later one takes
    return state, alive.peak - state
