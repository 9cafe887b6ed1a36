"""Foreign weights -> tensors by name, memory-mapped: safetensors, torch's pickles, sharded with an index.

Nothing here is trusted: no code of a file runs, names in an index stay within its folder, sizes are compared with the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inference.checkpoints.files.torch_file import checked, read_torch_file
from tokenloom_common.errors import MissingFileError, UserError, one_line

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
CONTAINERS = ("state_dict", "model", "module")
"""Where checkpoints keep their weights, in the order they are looked for: Lightning, plain scripts, DeepSpeed."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
MAX_INDEX_BYTES = 64 << 20


def read_weights(path: Path, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """All tensors of a weights file, or of the shards that an index.json names.

    containers: keys under which a torch file may keep its weights. Names lose what wrappers (FSDP, torch.compile, DDP) put
    before or into them. UserError in one line for anything that is not such a file.
    """
    if path.name.endswith(".index.json"):
        return _cleaned(_sharded(path, containers), path)
    return _cleaned(_one_file(path, containers), path)


def find_weights(folder: Path, stems: Sequence[str], what: str) -> Path:
    """The one weights file (or index) in a folder whose name is one of `stems` with a known ending; else MissingFileError."""
    for stem in stems:
        for ending in (".safetensors", ".safetensors.index.json", *TORCH_SUFFIXES, ".bin.index.json"):
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    raise MissingFileError(f"{folder}: no weights of {what} in it (looked for {', '.join(stems)} with .safetensors, .bin, .pt)")


def _one_file(path: Path, containers: Sequence[str]) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _tensors_in(read_torch_file(path), containers, path)
    raise UserError(f"{path}: not a weights file ({', '.join(SUFFIXES)}, or an index.json of shards)")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, OverflowError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)[:160]}); "
                        "download it again") from None


def _sharded(index: Path, containers: Sequence[str]) -> dict[str, Tensor]:
    """Every tensor from the shard that the index names for it."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise UserError(f"{index}: {index.stat().st_size:,} bytes is too large for an index of shards")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not an index of shards (no weight_map)") from None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(wanted.values())):
        if not file or Path(file).name != file or file.startswith("."):
            raise UserError(f"{index}: names a file outside its folder ({file!r}); refused")
        found = _one_file(index.parent / file, containers)
        lacking = [name for name, place in wanted.items() if place == file and name not in found]
        if lacking:
            raise UserError(f"{index.parent / file}: lacks {len(lacking)} tensors that the index places in it ({lacking[0]})")
        tensors |= {name: found[name] for name, place in wanted.items() if place == file}
    return tensors


def _tensors_in(payload: Any, containers: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The tensors of what a torch file holds: in the first of the containers that has some, or at the top."""
    if not isinstance(payload, Mapping):
        raise UserError(f"{path}: holds {type(payload).__name__}, expected a mapping of names to tensors")
    for key in containers:
        inner = payload.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            payload = inner
            break
    tensors = {str(name): checked(str(name), value, path) for name, value in payload.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(str(key)[:40] for key in list(payload)[:5])
        raise UserError(f"{path}: holds no tensors by name (found {keys or 'nothing'}; looked into {', '.join(containers)})")
    return tensors


def _cleaned(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what wrappers add. UserError where two tensors would get one name."""
    cleaned: dict[str, Tensor] = {}
    together = bool(tensors) and all(name.startswith("module.") for name in tensors)  # DistributedDataParallel
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.") if together else name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        if plain in cleaned:
            raise UserError(f"{path}: holds {plain} twice, with and without a wrapper's prefix")
        cleaned[plain] = tensor
    return cleaned


def below(tensors: Mapping[str, Tensor], prefixes: Sequence[str], known: str, where: Path) -> dict[str, Tensor]:
    """The tensors under the first of the prefixes below which there is one named `known`, without the prefix."""
    for prefix in prefixes:
        if prefix + known in tensors:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    some = ", ".join(sorted(tensors)[:3])
    raise UserError(f"{where}: no tensor is called {known}, so it is another kind of checkpoint (it has {some}, ...)")
