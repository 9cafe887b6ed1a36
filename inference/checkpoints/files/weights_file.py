"""Read the weights of other projects as tensors by name, memory-mapped: safetensors or torch files.

Both may be sharded with an index. Nothing here is trusted: no code of a file runs, names in an
index stay within its folder, sizes are compared with the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference.checkpoints.files.torch_file import checked, read_torch_file
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.file_contents import not_whole

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
CONTAINERS = ("state_dict", "model", "module")
"""Keys of the weights in a torch file, in search order: Lightning, plain scripts, DeepSpeed."""
MAX_INDEX_BYTES = 64 << 20  # about half a million tensors
# safetensors first: it is mapped as it is, and cannot ask for code
_ENDINGS = (".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES, ".bin.index.json")
# FSDP, torch.compile, activation checkpointing
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_SAFETENSORS_ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, AttributeError,
                       OverflowError, TypeError)


def read_weights(path: Path, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """All tensors of a weights file, or of the shards that an index.json names.

    containers: keys under which a torch file may keep its weights. Names lose the parts that
    wrappers (FSDP, torch.compile, DDP) add. UserError in one line for any other file.
    """
    if path.name.endswith(".index.json"):
        return _unwrapped(_read_shards(path, containers), path)
    return _unwrapped(_read_file(path, containers), path)


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


def _read_file(path: Path, containers: Sequence[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _tensors_in(read_torch_file(path), containers, path)
    raise UserError(f"{path}: not a weights file ({', '.join(SUFFIXES)}, "
                    "or an index.json of shards)")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())  # safe_open itself cannot be iterated
            return {name: file.get_tensor(name) for name in names}
    except _SAFETENSORS_ERRORS:
        raise not_whole(path, "safetensors file") from None


def _read_shards(index: Path, containers: Sequence[str]) -> dict[str, Tensor]:
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
        found = _read_file(index.parent / file, containers)
        # tensors that the index does not name are left out: it is the list of the model's tensors
        wanted = [name for name, place in files.items() if place == file]
        lacking = [name for name in wanted if name not in found]
        if lacking:
            raise UserError(f"{index.parent / file}: lacks {len(lacking)} tensors that the index "
                            f"places in it ({lacking[0]})")
        tensors |= {name: found[name] for name in wanted}
    return tensors


def _tensors_in(payload: Any, containers: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The tensors in a torch file: of the first container that has some, else at the top."""
    if not isinstance(payload, Mapping):
        raise UserError(f"{path}: holds {type(payload).__name__}, expected a "
                        "mapping of names to tensors")
    for key in containers:
        if _holds_tensors(payload.get(key)):
            payload = payload[key]
            break

    tensors = {}
    for key, value in payload.items():
        if isinstance(value, Tensor):  # beside them stand steps, arguments, optimizer states
            tensors[str(key)] = checked(str(key), value, path)
    if not tensors:
        keys = ", ".join(str(key)[:40] for key in list(payload)[:5])
        raise UserError(f"{path}: holds no tensors by name (found {keys or 'nothing'}; looked into "
                        f"{', '.join(containers)})")
    return tensors


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors by names without what wrappers add. UserError if two would get one name."""
    # DistributedDataParallel puts `module.` before every name; before some it belongs to the model
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    unwrapped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(prefix)
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in unwrapped:
            raise UserError(f"{path}: holds {plain} twice, with and without a wrapper's prefix")
        unwrapped[plain] = tensor
    return unwrapped


def below(tensors: Mapping[str, Tensor], prefixes: Sequence[str], known: str, where: Path
          ) -> dict[str, Tensor]:
    """The tensors under the first prefix that has one named `known`, without the prefix."""
    for prefix in prefixes:
        if prefix + known in tensors:
            # the rest of a larger model (a second stage, a language model) is dropped here
            inside = [name for name in tensors if name.startswith(prefix)]
            return {name.removeprefix(prefix): tensors[name] for name in inside}
    some = ", ".join(sorted(tensors)[:3])
    raise UserError(f"{where}: no tensor is called {known}, so it is another kind of checkpoint "
                    f"(it has {some}, ...)")
