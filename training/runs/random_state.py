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


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    numpy_state: Any = numpy.random.get_state()
    python_state = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state[1].astype(numpy.int64)),
        "numpy_rest": torch.tensor([float(numpy_state[2]), float(numpy_state[3]), float(numpy_state[4])], dtype=torch.float64),
        "python": torch.tensor(python_state[1], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if python_state[2] is None else python_state[2]], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    rest = state["numpy_rest"].tolist()
    numpy.random.set_state(("MT19937", state["numpy"].numpy().astype(numpy.uint32), int(rest[0]), int(rest[1]), rest[2]))
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
