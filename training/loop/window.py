"""Sums between two lines of the log: losses, time, waiting, memory."""

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
    """Sums between two log lines, part of a checkpoint.

    Tensors stay on the device until the line is written.
    """

    PREFIX = "window."

    def __init__(self, batch_size: int, tokens_per_item: int = 0,
                 peak_share: float | None = None) -> None:
        """batch_size: items per step over all processes; tokens_per_item: image tokens, 0 = none;
        peak_share: share of all devices' FLOPs that one item a second takes, None = unknown."""
        self.batch_size, self.tokens_per_item = batch_size, tokens_per_item
        self.peak_share = peak_share
        self.clear()

    def clear(self) -> None:
        """Begin a new line."""
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.resumed_steps = 0
        self.data_seconds = 0.0
        self.started = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """The sums so far, for a checkpoint between two log lines."""
        tensors = {f"{self.PREFIX}sum.{name}": total for name, total in self.sums.items()}
        tensors[f"{self.PREFIX}counts"] = torch.tensor([self.steps])
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue the sums of a checkpoint; the time between is not counted."""
        prefix = f"{self.PREFIX}sum."
        self.sums = {name.removeprefix(prefix): total for name, total in tensors.items()
                     if name.startswith(prefix)}
        self.steps = int(tensors[f"{self.PREFIX}counts"])
        self.resumed_steps = self.steps  # not timed here, so not part of the speed

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add scalar terms; one that is there in some steps only (R1) is averaged over those."""
        for name, value in terms.items():
            one = torch.ones_like(value, dtype=torch.float32)
            # on the device: reading the value here would wait for it in every micro-batch
            sum_and_count = torch.stack([value.detach().float(), one])  # [2]
            before = self.sums.get(name)
            if before is not None:  # on the CPU after a resume
                sum_and_count = before.to(value.device) + sum_and_count
            self.sums[name] = sum_and_count

    def means(self, group: Processes) -> dict[str, float]:
        """Return the mean of every term over steps and processes. All processes must call it."""
        return {name: group.mean(float(total / count))
                for name, (total, count) in self.sums.items()}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out the time of work between steps that is no training (save, sample, measure)."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began  # as if the line had begun later

    def speed(self) -> dict[str, float]:
        """Return items and image tokens per second over all processes, MFU and the data wait.

        mfu: model FLOPs utilization; data_wait: share of the time in which this process waited for
        data. Whatever is unknown is left out.
        """
        seconds = time.perf_counter() - self.started
        # resumed steps were trained before the clock of this line started
        samples_per_s = (self.steps - self.resumed_steps) * self.batch_size / seconds
        found = {"samples_per_s": samples_per_s}
        if self.tokens_per_item:
            found["tokens_per_s"] = samples_per_s * self.tokens_per_item
        if self.peak_share is not None:
            found["mfu"] = samples_per_s * self.peak_share
        return {**found, "data_wait": self.data_seconds / seconds}


def memory(group: Processes) -> dict[str, int]:
    """Return `memory_bytes` of the process that needs most. All processes must call it.

    On CUDA the peak of what PyTorch allocated since the last call; on the CPU the main memory that
    a process holds now, left out where the system does not say.
    """
    if group.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(group.device)
        torch.cuda.reset_peak_memory_stats(group.device)
    else:
        used = _resident()
    most = int(group.maximum(used))
    return {"memory_bytes": most} if most else {}


def _resident() -> int:
    """Return bytes of main memory, 0 without /proc."""
    try:
        _, resident_pages, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(resident_pages) * os.sysconf("SC_PAGE_SIZE")
