"""Versions and machine facts that a run's result depends on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "x-transformers", "vector-quantize-pytorch", "sentencepiece",
            "datasets", "numpy", "safetensors", "pillow")


def environment() -> dict[str, Any]:
    """Return the contents of env.json: Python, machine, package versions, command line."""
    return {"python": platform.python_version(), "platform": platform.platform(),
            # those that this process may use: taskset and cpusets give fewer than the machine has
            "cpus": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "packages": {name: _version(name) for name in PACKAGES}, "argv": sys.argv}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
