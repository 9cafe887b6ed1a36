"""The processes of a run: how they meet, what they tell one another, and errors that all of them raise."""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenloom_common.errors import RunFailedError, UserError

log = logging.getLogger(__name__)

SAID_AFTER_SECONDS = 20.0  # of waiting for the others


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
            everyone = self.gather((platform.node(), error))
            first_host = everyone[0][0]
            host, found = next((host, e) for host, e in everyone if e is not None)
            if host != first_host:  # the first process speaks, of a file that may well be there on its own machine
                found.raised_on = host
            raise shared(found)

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


@contextmanager
def meeting() -> Iterator[None]:
    """While the processes look for one another: say so when it takes long, and say in words when they do not meet."""
    here, world = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", os.environ["WORLD_SIZE"]
    words = f"rank {os.environ['RANK']} waits at {here} until all {world} processes of the run are there"
    said = threading.Timer(SAID_AFTER_SECONDS, log.warning, ["%s", words])
    said.daemon = True
    if os.environ["LOCAL_RANK"] == "0":
        said.start()
    try:
        yield
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {os.environ['MASTER_PORT']} of this machine is in use, perhaps by another run; give the "
                            "launcher another --master_port") from None
        reason = str(error).strip().splitlines()[0]
        raise RunFailedError(f"not all {world} processes of the run came to {here} ({reason[:120]}); start it on every "
                             "machine, each with its own rank, the address of rank 0's machine, and one open port") from None
    finally:
        said.cancel()


PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "remote process exited", "NCCL error",
                "Timed out waiting", "gloo")
"""What PyTorch's back ends say when a process does not answer any more."""


@contextmanager
def peers_may_go(group: Processes) -> Iterator[None]:
    """Turn what PyTorch raises here because another process is gone into a RunFailedError in words."""
    try:
        yield
    except RuntimeError as error:
        if group.world_size == 1 or isinstance(error, RunFailedError) or not any(word in str(error) for word in PEER_IS_GONE):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RunFailedError(f"another process of this run is gone ({reason[:160]}); its own message says why, if it had "
                             "time for one; the same command goes on from the last checkpoint") from None
