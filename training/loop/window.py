"""What is summed up between two lines of the log: losses, time, waiting, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from training.engine.processes import Processes


class Window:
    """Sums between two log lines; tensors stay on the device until the line is written. Part of a checkpoint."""

    PREFIX = "window."

    def __init__(self, batch_size: int, tokens_per_item: int = 0, peak_share: float | None = None) -> None:
        """batch_size, of all processes, and tokens_per_item say how fast it goes; peak_share: what one item a second takes of
        what all devices can compute, None where that is not known."""
        self.batch_size, self.tokens_per_item, self.peak_share = batch_size, tokens_per_item, peak_share
        self.clear()

    def clear(self) -> None:
        """A new line begins."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.resumed_steps = 0
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint between two log lines."""
        sums = {f"{self.PREFIX}sum.{name}": total for name, total in self.sums.items()}
        return {**sums, f"{self.PREFIX}counts": torch.tensor([self.steps])}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on with the sums of a checkpoint; the time between is not counted."""
        start = f"{self.PREFIX}sum."
        self.sums = {name.removeprefix(start): total for name, total in tensors.items() if name.startswith(start)}
        self.steps = int(tensors[f"{self.PREFIX}counts"])
        self.resumed_steps = self.steps

    def add(self, terms: dict[str, Tensor]) -> None:
        """A term that is there in some steps only (R1) is averaged over those."""
        for name, value in terms.items():
            before = self.sums.get(name)
            now = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])  # sum and count
            self.sums[name] = now if before is None else before.to(value.device) + now

    def means(self, group: Processes) -> dict[str, float]:
        """The mean of every term over steps and processes. Every process must call it."""
        return {name: group.mean(float(total[0] / total[1])) for name, total in self.sums.items()}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Work between two steps that is no training (saving, sampling, measuring): its time does not count."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began

    def speed(self) -> dict[str, float]:
        """Items and image tokens a second over all processes, model FLOPs utilization, and the share of the time in which this
        process waited for data. What is not known is left out."""
        seconds = time.perf_counter() - self.started
        samples_per_s = (self.steps - self.resumed_steps) * self.batch_size / seconds
        found = {"samples_per_s": samples_per_s}
        if self.tokens_per_item:
            found["tokens_per_s"] = samples_per_s * self.tokens_per_item
        if self.peak_share is not None:
            found["mfu"] = samples_per_s * self.peak_share
        return {**found, "data_wait": self.data_seconds / seconds}


def memory(group: Processes) -> dict[str, int]:
    """`memory_bytes` of the process that needs most; every process must call it. On CUDA the peak since the last call, of what
    PyTorch allocated; on the CPU what a process holds in main memory now, left out where the system does not say."""
    if group.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(group.device)
        torch.cuda.reset_peak_memory_stats(group.device)
    else:
        used = _resident()
    most = int(group.maximum(used))
    return {"memory_bytes": most} if most else {}


def _resident() -> int:
    """Bytes, 0 without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
