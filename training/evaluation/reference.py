"""Statistics of real pictures that a Frechet distance is measured against, saved once and used again.

An .npz file of plain arrays (no pickle): mean, covariance, count, and a JSON header with what they were made from.
"""

# Axes: F features

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.files import sync_path

FORMAT = "tokenloom reference statistics 1"
MAX_BYTES = 1 << 30  # of the arrays in a file; 2048 features take 34 MB
_ARRAYS = {"mean.npy", "covariance.npy", "count.npy", "header.npy"}
AGAIN = "make it again with --save-reference"


@dataclass(frozen=True)
class Preparation:
    """Everything beside the pictures that decides their features."""

    extractor: str
    weights_hash: str
    extractor_resize: str
    resolution: int
    resize: str
    crop: str


@dataclass(frozen=True)
class ReferenceStatistics:
    """mean [F] and covariance [F, F] in float64 over `count` pictures. fingerprint: hash of the preparation and every pixel."""

    mean: Tensor
    covariance: Tensor
    count: int
    preparation: Preparation
    fingerprint: str


class ImageHash:
    """blake2b over a preparation and pixels in their order, however they are cut into batches."""

    def __init__(self, preparation: Preparation) -> None:
        self._digest = hashlib.blake2b(json.dumps(asdict(preparation), sort_keys=True).encode(), digest_size=16)

    def update(self, pixels: Tensor) -> None:
        """Add uint8 pixels [B, S, S, 3]."""
        self._digest.update(pixels.contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        """32 hex digits."""
        return self._digest.hexdigest()


def save_reference(path: Path, statistics: ReferenceStatistics) -> None:
    """Write the file whole; it replaces an earlier one."""
    mean, covariance = statistics.mean.numpy(), statistics.covariance.numpy()
    header: dict[str, Any] = {"format": FORMAT, "preparation": asdict(statistics.preparation),
                              "fingerprint": statistics.fingerprint}
    header["checksum"] = _checksum(header, mean, covariance, statistics.count)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("wb") as file:
            numpy.savez(file, mean=mean, covariance=covariance, count=numpy.int64(statistics.count),
                        header=numpy.array(json.dumps(header)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def load_reference(path: Path) -> ReferenceStatistics:
    """Read and check a file. UserError if it is not one of ours or is damaged; nothing in it is unpickled."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of reference statistics; {AGAIN}")
    try:
        arrays = _read_arrays(path)
        header = json.loads(str(arrays["header"]))
        if header["format"] != FORMAT:
            raise ValueError("another format")
        count = int(arrays["count"])
        mean, covariance = arrays["mean"], arrays["covariance"]
        if mean.shape != (len(mean),) or covariance.shape != (len(mean),) * 2 or mean.dtype != covariance.dtype != float:
            raise ValueError("arrays of other shapes")
        if count < 2 or header.pop("checksum") != _checksum(header, mean, covariance, count):
            raise ValueError("its checksum differs")
        return ReferenceStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count,
                                   Preparation(**header["preparation"]), str(header["fingerprint"]))
    except (ValueError, LookupError, TypeError, EOFError, OSError, MemoryError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{path}: not a whole file of reference statistics ({said}); {AGAIN}") from None


def _read_arrays(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # looked at first: np.load would believe any size that a header claims
        if {item.filename for item in archive.infolist()} != _ARRAYS:
            raise ValueError("other arrays")
        if sum(item.file_size for item in archive.infolist()) > MAX_BYTES:
            raise ValueError("too large")
    with numpy.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _checksum(header: dict[str, Any], mean: numpy.ndarray, covariance: numpy.ndarray, count: int) -> str:
    digest = hashlib.blake2b(json.dumps([header, count], sort_keys=True).encode(), digest_size=16)
    for array in (mean, covariance):
        digest.update(numpy.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()


def check_reference(statistics: ReferenceStatistics, preparation: Preparation, dimensions: int, path: Path) -> None:
    """UserError if the statistics were made in another way than the pictures to compare will be, naming the difference."""
    there, here = asdict(statistics.preparation), asdict(preparation)
    for name, value in here.items():
        if there[name] != value:
            raise UserError(f"{path}: reference statistics with {name.replace('_', ' ')} {there[name]}, this evaluation has "
                            f"{value}; {AGAIN}")
    if len(statistics.mean) != dimensions:
        raise UserError(f"{path}: reference statistics of {len(statistics.mean)} features, expected {dimensions}; {AGAIN}")
