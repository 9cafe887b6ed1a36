"""Save and load one model as a folder: config.json, safetensors and README.md, as on the Hub.

huggingface_hub's own mixin loads with strict=False and ignores a missing or misspelt config; this
one refuses both.
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
from tokenloom_common.tensor_writer import INDEX_NAME, MAX_SHARD_SIZE, write_shards
from tokenloom_common.weights import WEIGHTS_NAME as WEIGHTS_NAME
from tokenloom_common.weights import check_numbers, check_tensors, read_tensors, shapes_of

SCHEMA_VERSION = 1
# patterns: a folder that holds nothing else may be replaced
OWN_FILES = ("config.json", "model*.safetensors", INDEX_NAME, CARD_NAME)
Config = TypeVar("Config", bound=StrictConfig)


class PretrainedModule(nn.Module, Pushable):
    """An nn.Module built from one config.

    kind: its name in config.json. config_class: the class that validates config.json. card: text of
    README.md in the folder that it was loaded from, if there is one.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[StrictConfig]]
    config: Any
    card: str | None = None

    def save_pretrained(self, folder: str | Path, max_shard_size: str = MAX_SHARD_SIZE,
                        card: str | None = None) -> Path:
        """Write config.json, safetensors (sharded above `max_shard_size`) and README.md.

        The folder appears whole or not at all. card: text of README.md; default: the one that the
        model was loaded with, else one that shows the config.
        """
        with atomic_folder(Path(folder), OWN_FILES) as aside:
            write_pretrained(self.kind, self.config, self.state_dict(), aside, max_shard_size)
            write_text_atomic(aside / CARD_NAME, card or self.card or _plain_card(self))
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        revision: str | None = None) -> Self:
        """Load from a local folder or a hub id, in eval mode. UserError on any mismatch.

        On the CPU the parameters are the file's pages, read when they are first used (see
        `read_tensors`); training changes this process's own copy of a page.
        """
        path = resolve_folder(folder, revision)
        config = read_config(path, cls.kind, cls.config_class)
        tensors = read_tensors(path)
        model = _with_tensors(cls, config, tensors, path)
        model.card = read_card(path)
        return model.to(device).eval()


def _with_tensors(kind: type[Any], config: StrictConfig, tensors: dict[str, Tensor], path: Path
                  ) -> Any:
    """A model whose parameters and buffers are `tensors`, cast to its dtypes."""
    try:
        # shapes are compared on the meta device, before a hostile config can allocate anything;
        # random numbers would be drawn there by torch._refs, which imports torch._dynamo (0.7 s)
        with torch.device("meta"), SkipParameterInit():
            model = kind(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: the weights do not fit config.json: no model can be built from "
                        f"it ({one_line(error)[:120]})") from None

    # the model's dtypes and not the file's: float16 weights are computed with in float32
    own = model.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in own.items()}
    check_tensors(shapes_of(own), shapes_of(tensors), path)
    check_numbers(dtypes, tensors, path)

    if has_unsaved_tensors(model):
        # on the meta device these have no values: build in memory, with parameters left unset
        with SkipParameterInit():
            model = kind(config)
    cast = {name: tensor.to(dtypes[name]) for name, tensor in tensors.items()}
    model.load_state_dict(cast, assign=True)  # no copy: the parameters stay the file's pages
    return model


def has_unsaved_tensors(model: nn.Module) -> bool:
    """Whether a model keeps tensors outside its state_dict, which no file can fill."""
    saved = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    for module in model.modules():
        # parameters, buffers (non-persistent ones too) and plain attributes, in lists and dicts
        attributes = [value for name, value in vars(module).items() if name != "_modules"]
        for leaf in tree_leaves(attributes):
            if isinstance(leaf, Tensor) and id(leaf) not in saved:
                return True
    return False


class SkipParameterInit(TorchFunctionMode):
    """Skip the random initialisation of parameters that weights from a file will replace.

    Beside the time it saves memory: pages that nothing writes to are never allocated.
    """

    _INITIALISERS: ClassVar[set[str]] = {
        "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
        "xavier_uniform_", "xavier_normal_"}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept torch.nn.init's functions (first argument `tensor`) and tensors' methods."""
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        # parameters only: a random buffer may be one that no file has
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in self._INITIALISERS:
            return target
        return func(*args, **kwargs)


def _plain_card(model: PretrainedModule) -> str:
    # the package, such as seq2seq, exports all of its models
    name, package = type(model).__name__, type(model).__module__.split(".")[0]
    return model_card(CardFacts(
        title=name, summary=f"A model of kind `{model.kind}`, saved with Tokenloom. Nothing is "
                            "known here of its training.",
        usage=f'from {package} import {name}\n\nmodel = {name}.from_pretrained("path/or/hub-id")',
        tags=(model.kind,), config=model.config.plain()))


class SavedAsConfig:
    """Base of parts without weights: the folder holds config.json and a subclass's `own_files`."""

    kind: ClassVar[str]
    own_files: ClassVar[tuple[str, ...]] = ("config.json",)
    config: Any

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all."""
        with atomic_folder(Path(folder), self.own_files) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """config.json into an existing folder."""
        write_config(self.kind, self.config, folder)


def write_config(kind: str, config: StrictConfig, folder: Path) -> None:
    """Write config.json, as read_config reads it."""
    values = {"kind": kind, "schema_version": SCHEMA_VERSION, **config.plain()}
    write_json_atomic(folder / "config.json", values)


def write_pretrained(kind: str, config: StrictConfig, state: dict[str, Tensor], folder: Path,
                     max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write config.json and safetensors into an existing empty folder.

    A view is written as the values it shows, not as its whole storage: the decoder fuses matrices
    and keeps views of them.
    """
    write_config(kind, config, folder)
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    write_shards(folder, shapes, state.__getitem__, max_shard_size)


def read_config(folder: Path, kind: str, config_class: type[Config]) -> Config:
    """Read a part's config.json. UserError for another kind, a later version or an unknown key."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such model folder")
    if not path.is_file():
        raise MissingFileError(f"{folder}: config.json is missing, so the folder is not a (whole) "
                               f"{kind} model")
    values = read_mapping(path)
    # popped: the rest are the fields of the config, of which it knows every one
    found = values.pop("kind", None)
    version = values.pop("schema_version", None)
    if found != kind:
        raise UserError(f"{path}: holds kind {found!r}, expected {kind!r}")
    # a later release may mean something else by the same keys
    if not isinstance(version, int) or version < 1 or version > SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version!r} is not supported (this release reads "
                        f"1 to {SCHEMA_VERSION})")
    return config_class.parse(values, str(path))
