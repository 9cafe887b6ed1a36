"""The processes of a run: how they meet and talk, and errors that all of them raise."""

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
    """The number of the run's processes on this machine."""
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
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
        # float64 has counts and bytes exactly; on the device, since NCCL reduces nothing else
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

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.world_size == 1:
            return tensor
        summed = tensor.to(self.device, copy=True)  # all_reduce overwrites its input
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, in order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Any) -> Any:
        """Run `action` on the first process, and return its result or raise its error on all."""
        result: Any = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except Exception as raised:  # kept for now: the others wait in the broadcast below
                error = raised

        if self.world_size > 1:
            outcome: list[Any] = [result, error]
            dist.broadcast_object_list(outcome, src=0)
            result, error = outcome
        if error is not None:
            raise shared(error)
        return result

    def first_then_others(self, action: Any) -> Any:
        """Run `action` on the first process, then on the others, which find its caches filled."""
        results: list[Any] = []
        # not the result of first_does: each process keeps its own, which need not be picklable
        self.first_does(lambda: results.append(action()))

        problem: Exception | None = None
        if not self.is_first:
            try:
                results.append(action())
            except Exception as error:
                problem = error
        self.raise_together(problem)
        return results[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every process what one of them met, so that none waits for one that has gone."""
        if not self.any(error is not None):
            return
        everyone = self.gather((platform.node(), error))  # errors are pickled on the way
        first_host, _ = everyone[0]
        host, found = next((host, error) for host, error in everyone if error is not None)
        if host != first_host:
            # the first process prints it, of a file that may well be there on its own machine
            found.raised_on = host
        raise shared(found)


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises, so that only the first one prints it."""
    error.raised_everywhere = True  # type: ignore[attr-defined]
    return error


@contextmanager
def meeting() -> Iterator[None]:
    """Log when the processes take long to find one another; explain it when they do not."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    timer = threading.Timer(SAID_AFTER_SECONDS, log.warning, [
        "rank %s waits at %s until all %s processes of the run are there", rank, address, world])
    timer.daemon = True  # or an exit while it waits would take as long
    if os.environ["LOCAL_RANK"] == "0":  # one line per machine
        timer.start()

    try:
        yield
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {os.environ['MASTER_PORT']} of this machine is in use, perhaps "
                            "by another run; give the launcher another --master_port") from None
        reason = _first_line(error)  # the rest is a C++ stack
        raise RunFailedError(f"not all {world} processes of the run came to {address} "
                             f"({reason[:120]}); start it on every machine, each with its own "
                             "rank, the address of rank 0's machine, and one open port") from None
    finally:
        timer.cancel()


PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Socket closed",
                "remote process exited", "NCCL error", "Timed out waiting", "gloo")
"""Words in the errors of PyTorch's back ends when a process does not answer any more."""


@contextmanager
def peers_may_go(group: Processes) -> Iterator[None]:
    """Explain the errors that PyTorch raises here because another process is gone."""
    try:
        yield
    except RuntimeError as error:  # collectives raise it for any reason: its words decide
        peer_is_gone = any(words in str(error) for words in PEER_IS_GONE)
        if group.world_size == 1 or isinstance(error, RunFailedError) or not peer_is_gone:
            raise
        reason = _first_line(error)
        raise RunFailedError(f"another process of this run is gone ({reason[:160]}); its own "
                             "message says why, if it had time for one; the same command goes on "
                             "from the last checkpoint") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
