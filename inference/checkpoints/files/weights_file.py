"""Read the weights of other projects as tensors by name, memory-mapped: safetensors or torch files.

Both may be sharded with an index. Nothing here is trusted: no code of a file runs, names in an
index stay within its folder, sizes are compared with the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference.checkpoints.files.torch_file import checked, read_torch_file
from inference.checkpoints.files.weight_choice import ChosenWeights, choose_set
from inference.checkpoints.files.weight_sets import (
    WeightsLayout,
    containers_of,
    plain_name,
)
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.file_contents import not_whole

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
MAX_INDEX_BYTES = 64 << 20  # about half a million tensors
# safetensors first: it is mapped as it is, and cannot ask for code
_ENDINGS = (".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES, ".bin.index.json")
_SAFETENSORS_ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, AttributeError,
                       OverflowError, TypeError)


def read_weights(path: Path, layout: WeightsLayout, wanted: str | None = None) -> ChosenWeights:
    """One set of weights of a file, or of the shards that an index.json names.

    wanted: --weight-set; None for the set that the project's own sampler takes. Names lose the
    prefix of the set, and the parts that wrappers (FSDP, torch.compile, DDP) add. UserError in one
    line for any other file, for another kind of model, and for a file without the wanted set.
    """
    payload = _read(path)
    chosen = choose_set(payload, layout, wanted, path)
    if chosen is None:
        raise _not_of_this_kind(payload, layout, path)
    dense = {name: checked(name, tensor, path) for name, tensor in chosen.tensors.items()}
    return replace(chosen, tensors=dense)


def _not_of_this_kind(payload: Mapping, layout: WeightsLayout, path: Path) -> UserError:
    names = sorted(name for container in containers_of(payload) for name in container.tensors)
    if not names:
        keys = ", ".join(str(key)[:40] for key in list(payload)[:5])
        return UserError(f"{path}: holds no tensors by name (found {keys or 'nothing'})")
    some = ", ".join(" ".join(name.split())[:80] for name in names[:3])
    return UserError(f"{path}: no tensor is called {' or '.join(layout.landmarks)}, so it is "
                     f"another kind of checkpoint (it has {some}, ...)")


def tensor_names(path: Path) -> list[str]:
    """The names of all tensors in all containers of a file, without what wrappers add."""
    return [plain_name(name) for container in containers_of(_read(path))
            for name in container.tensors]


def find_weights(folder: Path, stems: Sequence[str], what: str) -> Path:
    """The first weights file (or index) in a folder with one of `stems` and a known ending.

    MissingFileError, which calls them the weights of `what`, if there is none.
    """
    for stem in stems:
        for ending in _ENDINGS:
            path = folder / f"{stem}{ending}"
            if path.is_file():
                return path
    raise MissingFileError(f"{folder}: no weights of {what} in it (looked for {', '.join(stems)} "
                           "with .safetensors, .bin, .pt)")


def _read(path: Path) -> Mapping[Any, Any]:
    """The content of a file, or every tensor of the shards that an index names."""
    return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def _read_file(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        payload = read_torch_file(path)
        if not isinstance(payload, Mapping):
            raise UserError(f"{path}: holds {type(payload).__name__}, expected a mapping of names "
                            "to tensors")
        return payload
    raise UserError(f"{path}: not a weights file ({', '.join(SUFFIXES)}, "
                    "or an index.json of shards)")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())  # safe_open itself cannot be iterated
            return {name: file.get_tensor(name) for name in names}
    except _SAFETENSORS_ERRORS:
        raise not_whole(path, "safetensors file") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Every tensor from the shard that the index names for it."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index}: {index.stat().st_size:,} bytes is too large "
                        "for an index of shards")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not an index of shards (no weight_map)") from None

    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        # "" and ".." are caught too: they name the folder itself or its parent
        if not file or Path(file).name != file or file.startswith("."):
            raise UserError(f"{index}: names a file outside its folder ({file!r}); refused")
        found = _read_file(index.parent / file)
        # tensors that the index does not name are left out: it is the list of the model's tensors
        wanted = [name for name, place in files.items() if place == file]
        lacking = [name for name in wanted if name not in found]
        if lacking:
            raise UserError(f"{index.parent / file}: lacks {len(lacking)} tensors that the index "
                            f"places in it ({lacking[0]})")
        tensors |= {name: found[name] for name in wanted}
    return tensors
