"""Save and load one model as a folder: config.json + safetensors, in the Hub's own conventions, strictly.

huggingface_hub's own mixin loads with strict=False and ignores a missing or misspelt config; this one refuses both.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.files import atomic_folder, write_json_atomic

SCHEMA_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
OWN_FILES = ("config.json", "model*.safetensors", INDEX_NAME)
Config = TypeVar("Config", bound=StrictConfig)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PretrainedModule(nn.Module):
    """An nn.Module built from one config; `kind` names it in config.json and `config_class` validates it."""

    kind: ClassVar[str]
    config_class: ClassVar[type[StrictConfig]]
    config: Any

    def save_pretrained(self, folder: str | Path, max_shard_size: str = "5GB") -> Path:
        """Write config.json and safetensors (sharded above `max_shard_size`, with an index); the folder appears whole."""
        with atomic_folder(Path(folder), OWN_FILES) as aside:
            write_pretrained(self.kind, self.config, self.state_dict(), aside, max_shard_size)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        revision: str | None = None) -> Self:
        """Load from a local folder or a hub id, in eval mode. UserError on any mismatch, naming folder and tensors."""
        path = resolve_folder(folder, revision)
        config = read_config(path, cls.kind, cls.config_class)
        tensors = read_tensors(path)
        try:
            with torch.device("meta"):  # shapes are compared before a lying config can allocate anything
                expected = {name: tuple(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        except (RuntimeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path}: the weights do not fit config.json: no model can be built from it "
                            f"({' '.join(str(error).split())[:120]})") from None
        check_tensors(expected, {name: tuple(t.shape) for name, t in tensors.items()}, path)
        model = cls(config)
        model.load_state_dict(tensors)
        return model.to(device).eval()


class SavedAsConfig:
    """What has no weights of its own: its folder is config.json, and what a class writes beside it (`own_files`)."""

    kind: ClassVar[str]
    own_files: ClassVar[tuple[str, ...]] = ("config.json",)
    config: Any

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write its files; the folder appears whole."""
        with atomic_folder(Path(folder), self.own_files) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """config.json into an existing folder."""
        write_config(self.kind, self.config, folder)


def write_config(kind: str, config: StrictConfig, folder: Path) -> None:
    """config.json, as read_config reads it."""
    write_json_atomic(folder / "config.json", {"kind": kind, "schema_version": SCHEMA_VERSION, **config.plain()})


def write_pretrained(kind: str, config: StrictConfig, state: dict[str, Tensor], folder: Path,
                     max_shard_size: str = "5GB") -> None:
    """config.json and safetensors into an existing empty folder."""
    from huggingface_hub import save_torch_state_dict

    write_config(kind, config, folder)
    tensors = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in state.items()}
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view of a larger one (a sampler fuses matrices) would not be saved."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_config(folder: Path, kind: str, config_class: type[Config]) -> Config:
    """A part's config.json, checked for its kind, schema version and keys."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such model folder")
    if not path.is_file():
        raise MissingFileError(f"{folder}: config.json is missing, so the folder is not a (whole) {kind} model")
    values = read_mapping(path)
    found = values.pop("kind", None)
    version = values.pop("schema_version", None)
    if found != kind:
        raise UserError(f"{path}: holds kind {found!r}, expected {kind!r}")
    if not isinstance(version, int) or version < 1 or version > SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version!r} is not supported (this release reads 1 to {SCHEMA_VERSION})")
    return config_class.parse(values, str(path))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or shards, on the CPU."""
    names = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise MissingFileError(f"{path}: weights are missing; copy or download the model folder again")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())}); "
                            "copy or download it again") from None
    return tensors


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return [WEIGHTS_NAME]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not a safetensors index") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names a file outside the folder ({name!r})")
    return names


def check_tensors(expected: dict[str, tuple], found: dict[str, tuple], folder: Path) -> None:
    """UserError that lists up to five missing, unexpected and mis-shaped tensors and the folder."""
    problems = []
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [f"{n} {list(found[n])} instead of {list(expected[n])}"
              for n in sorted(expected.keys() & found.keys()) if expected[n] != found[n]]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{len(names)} {what} ({', '.join(names[:5])}{more})")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")


MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.md")


def resolve_folder(name: str | Path, revision: str | None = None, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """A local folder as it is, or the local snapshot of a hub id `owner/name`."""
    if not str(name):
        raise UserError("the model's folder is an empty name")
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file; give the model's folder")
    if not _HUB_ID.fullmatch(str(name)):
        raise MissingFileError(f"{name}: no such model folder; give the folder that training wrote as RUN/model, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingFileError(f"{name}: no such folder, and no hub model of that name can be fetched "
                               f"({type(error).__name__}); give the folder that training wrote as RUN/model") from None
