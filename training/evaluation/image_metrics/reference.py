"""Statistics of real images to measure Frechet distances against, saved once and used again.

An .npz file of plain arrays (no pickle): mean, covariance, count, and a JSON header that says what
they were made from.
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

from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import sync_path

FORMAT = "tokenloom reference statistics 1"
MAX_BYTES = 1 << 30  # of the arrays in a file; 2048 features take 34 MB
_ARRAYS = {"mean.npy", "covariance.npy", "count.npy", "header.npy"}
AGAIN = "make it again with --save-reference"


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the features of images, besides the images themselves."""

    extractor: str
    weights_hash: str
    extractor_resize: str
    resolution: int
    resize: str
    crop: str


@dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of the features of `count` images: mean [F], covariance [F, F], in float64.

    fingerprint: hash of the preparation and of every pixel.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    preparation: Preparation
    fingerprint: str


class ImageHash:
    """blake2b over a preparation and pixels in order, however they are cut into batches."""

    def __init__(self, preparation: Preparation) -> None:
        # the same pixels prepared for other features are another set: both are in the fingerprint
        described = json.dumps(asdict(preparation), sort_keys=True)
        self._digest = hashlib.blake2b(described.encode(), digest_size=16)

    def update(self, pixels: Tensor) -> None:
        """Add uint8 pixels [B, S, S, 3]."""
        self._digest.update(pixels.contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        """Return 32 hex digits."""
        return self._digest.hexdigest()


def save_reference(path: Path, statistics: ReferenceStatistics) -> None:
    """Write the file whole; it replaces an earlier one."""
    mean = statistics.mean.numpy()
    covariance = statistics.covariance.numpy()
    header: dict[str, Any] = {"format": FORMAT, "preparation": asdict(statistics.preparation),
                              "fingerprint": statistics.fingerprint}
    header["checksum"] = _checksum(header, mean, covariance, statistics.count)

    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own for each run, since two may write at once
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with aside.open("wb") as file:  # given a path, savez would add .npz to it
            numpy.savez(file, mean=mean, covariance=covariance,
                        count=numpy.int64(statistics.count),
                        header=numpy.array(json.dumps(header)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_path(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def load_reference(path: Path) -> ReferenceStatistics:
    """Read and check a file. Nothing is unpickled. UserError if it is not ours or is damaged."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of reference statistics; {AGAIN}")
    try:
        return _parse(_read_arrays(path))
    except (ValueError, LookupError, TypeError, EOFError, OSError, MemoryError,
            NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # whatever zipfile, numpy and json raise for a damaged file
        raise UserError(f"{path}: not a whole file of reference statistics "
                        f"({one_line(error)[:100]}); {AGAIN}") from None


def _parse(arrays: dict[str, Any]) -> ReferenceStatistics:
    """Check the arrays of a file. ValueError, LookupError or TypeError if they are not ours."""
    header = json.loads(str(arrays["header"]))
    if header["format"] != FORMAT:
        raise ValueError("another format")
    count = int(arrays["count"])
    mean = arrays["mean"]
    covariance = arrays["covariance"]
    features = len(mean)
    if mean.shape != (features,) or covariance.shape != (features, features):
        raise ValueError("arrays of other shapes")
    if mean.dtype != float or covariance.dtype != float:
        raise ValueError("arrays not in float64")
    checksum = header.pop("checksum")  # taken over the header without it
    if count < 2 or checksum != _checksum(header, mean, covariance, count):
        raise ValueError("its checksum differs")
    return ReferenceStatistics(torch.from_numpy(mean), torch.from_numpy(covariance), count,
                               Preparation(**header["preparation"]), str(header["fingerprint"]))


def _read_arrays(path: Path) -> dict[str, Any]:
    # the archive is looked at first: numpy.load would allocate whatever size a header claims
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if {entry.filename for entry in entries} != _ARRAYS:
            raise ValueError("other arrays")
        if sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise ValueError("too large")
    with numpy.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _checksum(header: dict[str, Any], mean: numpy.ndarray, covariance: numpy.ndarray,
              count: int) -> str:
    described = json.dumps([header, count], sort_keys=True)
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for array in (mean, covariance):  # little-endian, so that every machine has the same sum
        digest.update(numpy.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()


def check_reference(statistics: ReferenceStatistics, preparation: Preparation, dimensions: int,
                    path: Path) -> None:
    """Raise UserError, naming the difference, if the reference was prepared differently.

    preparation, dimensions: of the images to compare with it.
    """
    prepared = asdict(statistics.preparation)
    for name, value in asdict(preparation).items():
        if prepared[name] != value:
            words = name.replace("_", " ")
            raise UserError(f"{path}: reference statistics with {words} {prepared[name]}, this "
                            f"evaluation has {value}; {AGAIN}")
    features = len(statistics.mean)
    if features != dimensions:
        raise UserError(f"{path}: reference statistics of {features} features, expected "
                        f"{dimensions}; {AGAIN}")
