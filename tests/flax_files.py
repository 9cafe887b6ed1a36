"""Write Flax's weight files as flax.serialization.msgpack_serialize does, without Flax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy
from torch import Tensor

CHUNK_BYTES = 2**30  # Flax's; tests make it small


def flax_bytes(tree: dict[str, Any], chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Nested maps of arrays (numpy or torch) -> the bytes of a file."""
    return msgpack.packb(_split(tree, chunk_bytes), default=_extension, strict_types=True)


def write_flax(path: Path, tree: dict[str, Any]) -> Path:
    path.write_bytes(flax_bytes(tree))
    return path


def nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """Names with dots -> maps within maps."""
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *folders, last = name.split(".")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = value
    return tree


def packed(shape: tuple, dtype: str, content: bytes) -> bytes:
    """The content of an array's extension."""
    return msgpack.packb((shape, dtype, content), use_bin_type=True)


def _extension(value: Any) -> msgpack.ExtType:
    if isinstance(value, Tensor):  # numpy has no bfloat16
        import torch

        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        return msgpack.ExtType(1, packed(tuple(value.shape), dtype, content))
    if isinstance(value, numpy.ndarray):
        return msgpack.ExtType(1, packed(value.shape, value.dtype.name, value.tobytes()))
    if isinstance(value, numpy.generic):
        array = numpy.asarray(value)
        return msgpack.ExtType(3, packed(array.shape, array.dtype.name, array.tobytes()))
    assert isinstance(value, complex)
    return msgpack.ExtType(2, msgpack.packb((value.real, value.imag)))


def _split(value: Any, chunk_bytes: int) -> Any:
    if isinstance(value, dict):
        # JAX sorts the keys of a tree
        return {name: _split(value[name], chunk_bytes) for name in sorted(value)}
    if not isinstance(value, numpy.ndarray) or value.size * value.itemsize <= chunk_bytes:
        return value
    step = max(1, chunk_bytes // value.itemsize)
    flat = value.reshape(-1)
    chunks = [flat[first: first + step] for first in range(0, value.size, step)]
    return {"__msgpack_chunked_array__": True,
            "shape": {str(axis): side for axis, side in enumerate(value.shape)},
            "chunks": {str(number): chunk for number, chunk in enumerate(chunks)}}
