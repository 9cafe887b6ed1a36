"""Save and load one model as a folder: config.json + safetensors + README.md, in the Hub's own conventions, strictly.

huggingface_hub's own mixin loads with strict=False and ignores a missing or misspelt config; this one refuses both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import atomic_folder, write_json_atomic, write_text_atomic
from tokenloom_common.hub import MODEL_FILES as MODEL_FILES
from tokenloom_common.hub import Pushable, resolve_folder
from tokenloom_common.model_card import CARD_NAME, CardFacts, model_card, read_card
from tokenloom_common.tensor_writer import INDEX_NAME, write_shards
from tokenloom_common.weights import WEIGHTS_NAME as WEIGHTS_NAME
from tokenloom_common.weights import check_numbers, check_tensors, read_tensors

SCHEMA_VERSION = 1
OWN_FILES = ("config.json", "model*.safetensors", INDEX_NAME, CARD_NAME)
Config = TypeVar("Config", bound=StrictConfig)


class PretrainedModule(nn.Module, Pushable):
    """An nn.Module built from one config; `kind` names it in config.json and `config_class` validates it.

    card: the text of its README.md, where it was loaded from a folder that has one.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[StrictConfig]]
    config: Any
    card: str | None = None

    def save_pretrained(self, folder: str | Path, max_shard_size: str = "5GB", card: str | None = None) -> Path:
        """Write config.json, safetensors (sharded above `max_shard_size`, with an index) and README.md; the folder appears
        whole. card: README.md's text; none = the one that it was loaded with, or one that says what the config does."""
        with atomic_folder(Path(folder), OWN_FILES) as aside:
            write_pretrained(self.kind, self.config, self.state_dict(), aside, max_shard_size)
            write_text_atomic(aside / CARD_NAME, card or self.card or _plain_card(self))
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        revision: str | None = None) -> Self:
        """Load from a local folder or a hub id, in eval mode. UserError on any mismatch, naming folder and tensors.

        On the CPU the parameters are the file's pages, read when they are first used (see `read_tensors`); what changes
        them, such as training, changes this process's own copy of a page.
        """
        path = resolve_folder(folder, revision)
        config = read_config(path, cls.kind, cls.config_class)
        tensors = read_tensors(path)
        model = _with_tensors(cls, config, tensors, path)
        model.card = read_card(path)
        return model.to(device).eval()


def _with_tensors(kind: type[Any], config: StrictConfig, tensors: dict[str, Tensor], path: Path) -> Any:
    """A model whose parameters and buffers are `tensors`, in its own dtypes; no number is drawn or copied for them."""
    try:
        with torch.device("meta"):  # shapes are compared before a lying config can allocate anything
            model = kind(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: the weights do not fit config.json: no model can be built from it "
                        f"({one_line(error)[:120]})") from None
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    check_tensors({name: shape for name, (shape, _) in own.items()},
                  {name: tuple(t.shape) for name, t in tensors.items()}, path)
    check_numbers({name: dtype for name, (_, dtype) in own.items()}, tensors, path)
    if keeps_what_no_file_has(model):
        with Undrawn():
            model = kind(config)
    model.load_state_dict({name: tensor.to(own[name][1]) for name, tensor in tensors.items()}, assign=True)
    return model


def keeps_what_no_file_has(model: nn.Module) -> bool:
    """Whether a model on the meta device has tensors outside its state_dict, which only building it in earnest can fill."""
    saved = model.state_dict(keep_vars=True).values()
    known = {id(tensor) for tensor in saved}
    held = (value for module in model.modules() for name, value in vars(module).items() if name != "_modules")
    return any(isinstance(leaf, Tensor) and id(leaf) not in known for value in held for leaf in tree_leaves(value))


class Undrawn(TorchFunctionMode):
    """Within it, parameters are not filled with random numbers: a file's numbers take their place, and memory that nothing is
    written to costs nothing."""

    _DRAWS: ClassVar[set[str]] = {"uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
                                  "xavier_uniform_", "xavier_normal_"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.nn.init's functions and tensors' own methods both come here."""
        target = args[0] if args else (kwargs or {}).get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in self._DRAWS:
            return target
        return func(*args, **(kwargs or {}))


def _plain_card(model: PretrainedModule) -> str:
    name, package = type(model).__name__, type(model).__module__.split(".")[0]
    return model_card(CardFacts(
        title=name, summary=f"A model of kind `{model.kind}`, saved with Tokenloom. Nothing is known here of its training.",
        usage=f'from {package} import {name}\n\nmodel = {name}.from_pretrained("path/or/hub-id")',
        tags=(model.kind,), config=model.config.plain()))


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
    """config.json and safetensors into an existing empty folder. A view is written as the numbers it shows (a sampler fuses
    matrices)."""
    write_config(kind, config, folder)
    write_shards(folder, {name: tensor.to("meta") for name, tensor in state.items()}, lambda name: state[name], max_shard_size)


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
