"""The models that a server draws with: names -> folders, their memory, and their description."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inference.decoder.projection import Precision, check_precision
from inference.generation.row_buffers import KEPT_TEXTS
from inference.image_files.fingerprint import model_fingerprint
from inference.memory.available import available_memory
from inference.memory.estimate import MemoryEstimate, Workload, check_fits, estimate
from inference.memory.sizes import exact_and_human
from inference.model_folder import GENERATION_NAME, INDEX_NAME, read_model_index
from inference.pipeline import TextToImage
from inference.sampling import SamplingParams
from inference.serving.engine.jobs import UnknownModelError
from inference.serving.engine.model_memory import attention_bytes, frozen_encoder_bytes
from seq2seq import TRANSFORMER_KINDS, TransformerConfig
from tokenizer_image import IMAGE_TOKENIZERS
from tokenizer_image.config import ImageTokenizerConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError, choose, nearest_name
from tokenloom_common.model_card import read_card
from tokenloom_common.pretrained import read_config, resolve_folder

DEFAULT_ROWS = 16
MAX_DEPTH = 3
"""Folders below --models that are looked into: DIR/name, and DIR/group/name/model of a run."""
BUDGET_SHARE = 0.8
"""Share of the memory that is there at the start, which models may take where no budget is given;
the rest is for what grows: replies, other processes."""
_ESTIMATING = threading.Lock()
"""Estimates replace functions of torch for a moment, which two threads must not do at once."""


@dataclass(frozen=True)
class ModelOptions:
    """How models are loaded.

    rows: of each model's batch; an image under guidance takes two. memory: bytes that all loaded
    models may take together, by prediction; None for BUDGET_SHARE of what is there.
    weights, text_encoder: see `TextToImage.from_pretrained`.
    """

    rows: int = DEFAULT_ROWS
    memory: int | None = None
    device: str | None = None
    weights: Precision | None = None
    text_encoder: str | None = None


class ServedModel:
    """A model folder as it is on disk: its settings, which need no weights, and its memory."""

    def __init__(self, name: str, folder: Path, options: ModelOptions) -> None:
        self.name = name
        self.folder = folder
        self.options = options
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = torch.device(self.device).type == "cuda"
        self.weights: Precision = options.weights or ("bfloat16" if on_cuda else "float32")

        index = read_model_index(folder)
        tokenizer = choose(IMAGE_TOKENIZERS, str(index.get("tokenizer_image")),
                           f"{folder / INDEX_NAME}: kind of image tokenizer")
        seq2seq = choose(TRANSFORMER_KINDS, str(index.get("seq2seq")),
                         f"{folder / INDEX_NAME}: kind of seq2seq model")
        self.tokenizer_config: ImageTokenizerConfig = read_config(
            folder / "tokenizer_image", tokenizer.kind, tokenizer.config_class)
        self.config: TransformerConfig = read_config(
            folder / "seq2seq", seq2seq.kind, seq2seq.config_class)
        generation_file = folder / GENERATION_NAME
        self.defaults = SamplingParams.parse(read_mapping(generation_file), str(generation_file))

    @cached_property
    def needs(self) -> MemoryEstimate:
        """The predicted memory of the loaded model with a full batch."""
        rows = self.options.rows
        # guided=False, since `rows` counts both branches; the captions of the rows, the next one,
        # and kept texts
        work = Workload(rows, rows + 1 + KEPT_TEXTS, guided=False, weights=self.weights,
                        decoded=1, kept=rows, streamed=True)
        with _ESTIMATING:
            return estimate(self.config, self.tokenizer_config, work)

    @cached_property
    def bytes(self) -> int:
        """Predicted bytes of the loaded model, with its frozen text encoder and `words`."""
        encoder = frozen_encoder_bytes(self.folder, self.options.text_encoder)
        return self.needs.total + encoder + attention_bytes(self.config)

    def load(self) -> TextToImage:
        """Load the model. UserError for one that is damaged, or that memory has no room for."""
        check_fits(self.bytes, available_memory(self.device),
                   f"model {self.name} with {self.options.rows} rows",
                   "give fewer rows (--rows), or end what else takes memory")
        return TextToImage.from_pretrained(
            self.folder, self.device, text_encoder=self.options.text_encoder,
            weights=self.weights)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Describe the model, as GET /v1/models does."""
        config, side = self.config, self.tokenizer_config.resolution
        layout = None
        if config.layout_grid is not None:
            layout = {"kind": config.layout_kind, "grid": list(config.layout_grid),
                      "classes": config.layout_classes}
        return {
            "title": _title(read_card(self.folder), self.name),
            "size": f"{side}x{side}",
            "grid": list(config.grid),
            "image_tokens": config.num_tokens,
            "text_length": config.text_length,
            "layout": layout,
            "sampling": self.defaults.plain(),
            "weights": self.weights,
            "fingerprint": model_fingerprint(self.folder),
            "created": int((self.folder / INDEX_NAME).stat().st_mtime),
        }


class Models:
    """All models of a server by name; the first one is drawn with where a request names none."""

    def __init__(self, folders: Mapping[str, str | Path],
                 options: ModelOptions = ModelOptions()) -> None:
        """folders: name -> local folder or hub id. UserError for one that cannot be served."""
        check_precision(options.weights)
        if not isinstance(options.rows, int) or isinstance(options.rows, bool) or options.rows < 1:
            raise UserError(f"rows must be a whole number of at least 1, got {options.rows!r}")
        if not folders:
            raise UserError("no model is given")
        self.options = options
        self._served = {}
        for name, folder in folders.items():
            self._served[name] = ServedModel(name, resolve_folder(folder), options)
        self.device = next(iter(self._served.values())).device
        self.budget = options.memory
        if self.budget is None:
            available = available_memory(self.device)
            self.budget = None if available is None else int(available * BUDGET_SHARE)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models, in their order."""
        return tuple(self._served)

    def __getitem__(self, name: str) -> ServedModel:
        """Return a model by name. UnknownModelError with the nearest name."""
        if name not in self._served:
            raise UnknownModelError(f"unknown model '{name}'{nearest_name(name, self._served)}")
        return self._served[name]

    def describe(self, name: str) -> dict[str, Any]:
        """Return what GET /v1/models says of a model. The first call takes about a second.

        UserError for a model that can never be loaded.
        """
        self.check_budget(name)
        return dict(self[name].description)

    def check_budget(self, name: str) -> None:
        """Raise UserError for a model that can never be loaded."""
        needed = self[name].bytes  # also without a budget: reading files takes a while, and is kept
        if self.budget is not None and needed > self.budget:
            raise UserError(
                f"model {name} needs {exact_and_human(needed)} with {self.options.rows} "
                f"rows, and models may take {exact_and_human(self.budget)}; give fewer rows "
                "(--rows) or more memory (--memory)")


def model_name(folder: str | Path) -> str:
    """Return the name of a model given by its folder or hub id.

    `model`, as training calls each run's, says nothing: the name is the run's then.
    """
    path = Path(folder)
    if not path.is_dir():
        return str(folder)  # a hub id
    path = path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def find_models(folder: Path) -> dict[str, Path]:
    """Return the model folders below a folder by their names: paths from it, without `/model`.

    UserError where there is none.
    """
    if not folder.is_dir():
        raise MissingFileError(f"--models {folder}: no such folder")
    if (folder / INDEX_NAME).is_file():
        raise UserError(f"--models {folder}: is a model folder itself; give it without --models")

    found: dict[str, Path] = {}
    for place, below, files in os.walk(folder, followlinks=True):
        path = Path(place)
        parts = path.relative_to(folder).parts
        below[:] = sorted(name for name in below if not name.startswith("."))
        if len(parts) >= MAX_DEPTH:
            below.clear()
        if INDEX_NAME not in files:
            continue
        below.clear()
        shown = parts[:-1] if len(parts) > 1 and parts[-1] == "model" else parts
        found["/".join(shown)] = path
    if not found:
        raise UserError(f"--models {folder}: holds no model folder (looked for {INDEX_NAME}, "
                        f"{MAX_DEPTH} folders deep)")
    return dict(sorted(found.items()))


def _title(card: str | None, name: str) -> str:
    """Return the title of a model card, the model's name without one."""
    for line in (card or "").splitlines():
        if line.startswith("# "):
            return line.removeprefix("# ").strip() or name
    return name
