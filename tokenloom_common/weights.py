"""The tensors of a model folder: one safetensors file or shards with an index, mapped into memory and checked.

Nothing of a folder is trusted: a header, an index or a file that says what is not so is one line of error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.tensor_writer import ALIGNMENT, INDEX_NAME

WEIGHTS_NAME = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20  # about half a million tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or shards, on the CPU; each file is opened once.

    They are the file's own pages, mapped privately: a number is read from disk when it is first used, and what is written to
    a tensor stays in this process. A file that is replaced (renamed over) or deleted meanwhile keeps its numbers; one that is
    overwritten in place does not. What lies at an odd address, as in files of other writers, is copied.
    UserError or MissingFileError on any damage.
    """
    shards = _weight_map(folder)
    if shards is None:
        return dict(_tensors_of(folder / WEIGHTS_NAME))
    for file in shards:
        _check_there(folder / file)
    tensors: dict[str, Tensor] = {}
    for file, named in shards.items():
        found = dict(_tensors_of(folder / file))
        for what, names in (("names {} in {}, which lacks it", named - found.keys()),
                            ("does not name {} in {}, which holds it", found.keys() - named)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{folder / INDEX_NAME}: {what.format(repr(min(names)) + more, file)}; copy or download the "
                                "model folder again")
        tensors |= found
    return tensors


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise MissingFileError(f"{path}: weights are missing; copy or download the model folder again")


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    _check_there(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                tensor = file.get_tensor(name)
                yield name, tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)[:200]}); "
                        "copy or download it again") from None


def _weight_map(folder: Path) -> dict[str, set[str]] | None:
    """Shard -> names of its tensors, as the index has them; None where one file holds all."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index}: {index.stat().st_size:,} bytes is too large for an index (limit {MAX_INDEX_BYTES:,})")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = list(weight_map.items())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not a safetensors index") from None
    shards: dict[str, set[str]] = {}
    for tensor, file in pairs:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names a file outside the folder ({file!r})")
        shards.setdefault(file, set()).add(tensor)
    if (folder / WEIGHTS_NAME).is_file() and WEIGHTS_NAME not in shards:
        raise UserError(f"{folder}: holds {WEIGHTS_NAME} and an index of other files, and only one of them can be the model; "
                        f"delete {WEIGHTS_NAME} or {INDEX_NAME}")
    return dict(sorted(shards.items()))


def check_numbers(expected: dict[str, torch.dtype], found: dict[str, Tensor], folder: Path) -> None:
    """UserError for a tensor of another kind of number than the model's, which a cast would turn into wrong ones."""
    for name, tensor in found.items():
        if tensor.is_complex() or tensor.is_floating_point() != expected[name].is_floating_point:
            theirs, ours = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, expected[name]))
            raise UserError(f"{folder}: the weights do not fit config.json: {name} holds {theirs}, the model {ours}")


def check_tensors(expected: dict[str, tuple], found: dict[str, tuple], folder: Path) -> None:
    """UserError that lists up to five missing, unexpected and mis-shaped tensors and the folder."""
    problems = []
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(" ".join(name.split())[:100] for name in found.keys() - expected.keys())
    shapes = [f"{n} {str(list(found[n]))[:80]} instead of {list(expected[n])}"
              for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{len(names)} {what} ({', '.join(names[:5])}{more})")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
