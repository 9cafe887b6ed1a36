"""The processes of a run: what they tell one another, and errors that all of them raise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes_here() -> int:
    """How many of a run's processes this machine has."""
    # DeepSpeed's launcher says it as LOCAL_SIZE, torchrun as LOCAL_WORLD_SIZE
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True on every process when it is True on one."""
        return self.maximum(float(flag)) > 0

    def maximum(self, value: float) -> float:
        """The largest value over the processes."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def mean(self, value: float) -> float:
        """The mean of a value over the processes."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor.item()) / self.world_size

    def first_does(self, action: Any) -> Any:
        """Run `action` on the first process, wait, and give its result to all; its error is raised on all."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise shared(outcome[1])
        return outcome[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every process what one of them met, so that none waits for one that has gone."""
        if self.any(error is not None):
            errors: list[Exception | None] = [error]
            if self.world_size > 1:
                errors = [None] * self.world_size
                dist.all_gather_object(errors, error)
            raise shared(next(e for e in errors if e is not None))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world_size == 1:
            return tensor
        summed = tensor.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, in order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_then_others(self, action: Any) -> Any:
        """Run `action` on the first process, then on the others, which find the caches that it filled."""
        kept: list[Any] = []
        self.first_does(lambda: kept.append(action()))
        problem: Exception | None = None
        if not self.is_first:
            try:
                kept.append(action())
            except Exception as error:
                problem = error
        self.raise_together(problem)
        return kept[0]


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises, so that only the first one prints it."""
    error.raised_everywhere = True  # type: ignore[attr-defined]
    return error
