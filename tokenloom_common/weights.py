"""Read the tensors of a model folder: one safetensors file or shards with an index, mapped.

Nothing in a folder is trusted: a header, index or file that does not hold what it claims is an
error in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.file_contents import not_whole
from tokenloom_common.tensor_writer import ALIGNMENT, INDEX_NAME

WEIGHTS_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20  # about half a million tensors
LISTED = 5  # names per kind of problem in an error message
_DAMAGE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError,
           MemoryError)
"""Errors of safe_open for headers that lie."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or shards, on the CPU; each file is opened once.

    They are the file's own pages, mapped privately: a page is read from disk when it is first used,
    and writing to a tensor changes this process's copy only. A file that is replaced (renamed over)
    or deleted meanwhile keeps its values; one that is overwritten in place does not. Unaligned
    tensors, as in files of other writers, are copied. UserError or MissingFileError on any damage.
    """
    shards = _shards(folder)
    if shards is None:
        return dict(_tensors_of(folder / WEIGHTS_NAME))

    for file in shards:
        _check_there(folder / file)  # before gigabytes of the first shard are read
    tensors: dict[str, Tensor] = {}
    for file, indexed in shards.items():
        # the whole file, and not the names of the index, to find tensors that it does not name
        found = dict(_tensors_of(folder / file))
        _check_shard(folder / INDEX_NAME, file, indexed, set(found))
        tensors |= found
    return tensors


def _check_shard(index: Path, file: str, indexed: set[str], found: set[str]) -> None:
    """UserError unless a shard holds exactly the tensors that the index names for it."""
    lacking, unnamed = indexed - found, found - indexed
    if lacking:
        problem = f"names {_first(lacking)} in {file}, which lacks it"
    elif unnamed:
        problem = f"does not name {_first(unnamed)} in {file}, which holds it"
    else:
        return
    raise UserError(f"{index}: {problem}; copy or download the model folder again")


def _first(names: set[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return repr(min(names)) + more


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path}: weights are missing; copy or "
                               "download the model folder again")


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    _check_there(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tensor = file.get_tensor(name)
                aligned = tensor.data_ptr() % ALIGNMENT == 0  # kernels round differently if not
                yield name, tensor if aligned else tensor.clone()
    except _DAMAGE:
        raise not_whole(path, "safetensors file", "copy or download it again") from None


def _shards(folder: Path) -> dict[str, set[str]] | None:
    """Shard file -> names of its tensors, from the index; None if one file holds all."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index}: {index.stat().st_size:,} bytes is too large for an index (limit "
                        f"{MAX_INDEX_BYTES:,})")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(weight_map.items())
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):  # any other JSON
        raise UserError(f"{index}: not a safetensors index") from None

    shards: dict[str, set[str]] = {}
    for tensor, file in pairs:
        is_name = isinstance(file, str) and Path(file).name == file
        if not is_name or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names a file outside the folder ({file!r})")
        shards.setdefault(file, set()).add(tensor)
    if (folder / WEIGHTS_NAME).is_file() and WEIGHTS_NAME not in shards:
        raise UserError(f"{folder}: holds {WEIGHTS_NAME} and an index of other files, and only one "
                        f"of them can be the model; delete {WEIGHTS_NAME} or {INDEX_NAME}")
    return dict(sorted(shards.items()))


def check_numbers(expected: Mapping[str, torch.dtype], found: Mapping[str, Tensor], folder: Path
                  ) -> None:
    """UserError for an integer or complex tensor in the place of floats, or the reverse.

    A cast would load it without an error, as wrong weights.
    """
    for name, tensor in found.items():
        is_float = expected[name].is_floating_point
        if tensor.is_complex() or tensor.is_floating_point() != is_float:
            in_file = str(tensor.dtype).removeprefix("torch.")  # torch.int8 -> int8
            in_model = str(expected[name]).removeprefix("torch.")
            raise UserError(f"{folder}: the weights do not fit config.json: {name} holds "
                            f"{in_file}, the model {in_model}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(expected: Mapping[str, tuple], found: Mapping[str, tuple], folder: Path) -> None:
    """UserError that lists up to five missing, unexpected and mis-shaped tensors and the folder."""
    missing = sorted(expected.keys() - found.keys())
    # folded and cut: a hostile file's names may be pages long
    unexpected = sorted(" ".join(name.split())[:100] for name in found.keys() - expected.keys())
    mis_shaped = []
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            shown = str(list(found[name]))[:80]  # a hostile file may claim thousands of axes
            mis_shaped.append(f"{name} {shown} instead of {list(expected[name])}")

    problems = list_problems(
        {"missing": missing, "unexpected": unexpected, "mis-shaped": mis_shaped})
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {problems}")


def list_problems(problems: Mapping[str, list[str]]) -> str:
    """Names by kind of problem -> `2 missing (a, b); 7 mis-shaped (a, b, c, d, e and 2 more)`."""
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:LISTED])}{more})")
    return "; ".join(parts)
