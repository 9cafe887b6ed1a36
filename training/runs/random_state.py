"""Seed, save and restore random number generators."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch; dropout differs between the processes."""
    random.seed(seed + rank)
    numpy.random.seed((seed + rank) % (1 << 32))
    torch.manual_seed(seed + rank)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of all generators as tensors, for a checkpoint."""
    numpy_state: Any = numpy.random.get_state()
    _, numpy_key, position, has_gauss, numpy_gauss = numpy_state
    _, python_key, python_gauss = random.getstate()
    # random.gauss makes pairs, and keeps the second number for the next call
    if python_gauss is None:
        python_gauss = math.nan

    # a checkpoint holds tensors alone; float64 keeps each of the three as it is
    numpy_rest = [float(position), float(has_gauss), float(numpy_gauss)]
    state = {"torch": torch.get_rng_state(),
             "numpy": torch.from_numpy(numpy_key.astype(numpy.int64)),
             "numpy_rest": torch.tensor(numpy_rest, dtype=torch.float64),
             "python": torch.tensor(python_key, dtype=torch.int64),
             "python_gauss": torch.tensor([python_gauss], dtype=torch.float64)}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Set all generators to the state that `rng_state` returned."""
    torch.set_rng_state(state["torch"])

    numpy_key = state["numpy"].numpy().astype(numpy.uint32)
    position, has_gauss, numpy_gauss = state["numpy_rest"].tolist()
    numpy.random.set_state(("MT19937", numpy_key, int(position), int(has_gauss), numpy_gauss))

    python_key = tuple(state["python"].tolist())
    python_gauss = state["python_gauss"].item()
    # 3: Python's format
    random.setstate((3, python_key, None if math.isnan(python_gauss) else python_gauss))

    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
