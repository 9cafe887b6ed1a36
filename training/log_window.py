"""What is summed up between two lines of the log: losses, time, waiting."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from training.config import RunConfig
from training.process_group import Processes


class Window:
    """Sums between two log lines; tensors stay on the device until the line is written. Part of a checkpoint."""

    PREFIX = "window."

    def __init__(self, config: RunConfig) -> None:
        self.batch_size = config.train.batch_size
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

    def speed(self) -> dict[str, float]:
        """Samples a second over all processes, and the share of the time in which this one waited for data."""
        seconds = time.perf_counter() - self.started
        return {"samples_per_s": (self.steps - self.resumed_steps) * self.batch_size / seconds,
                "data_wait": self.data_seconds / seconds}
