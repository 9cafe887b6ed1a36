"""The sizes of a planned training that its config leaves to its files: read from those that are there, else given as options or
assumed, which is said."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from inference.memory.sizes import PRESET_SIZES, grid_of
from inference.scoring.matcher import Matcher, MatcherConfig
from inference.scoring.matcher_folder import find_matcher_folder
from seq2seq import ClassLabels, FrozenTextEncoder, TransformerConfig, load_text_source
from seq2seq.config import DERIVED
from tokenizer_image import IMAGE_TOKENIZERS, ImageTokenizerConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError, choose
from tokenloom_common.pretrained import read_config
from training.config.matcher import MatcherRunConfig
from training.config.run import DataConfig, RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.start_folders import CONFIGS, IMAGE_FOLDER, find_start
from training.config.text import TextConfig
from training.data.run_data import open_pictures
from training.data.text_input import DEFAULT_TEXT_LENGTH, DEFAULT_VOCAB_SIZE
from training.data.tokens.shards import INDEX_NAME, read_index

DEFAULTS: dict[str, Any] = {**PRESET_SIZES, "text_length": DEFAULT_TEXT_LENGTH, "vocab_size": DEFAULT_VOCAB_SIZE,
                            "feature_width": 768, "rows": None}
"""Option -> what is assumed where neither it nor a file says. 768: the width of T5's and BERT's base models."""
DEFAULT_CLASSES = 1000
_LIVE_ENCODER = "the frozen text encoder, which encodes captions as they come (no text.feature_cache)"


class Sizes:
    """Sizes as they become known: `take` from a file, else from an option, else as assumed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._unread = {name for name in DEFAULTS if getattr(options, name) is not None}
        self.assumed: list[str] = []
        """What no file said, a sentence each."""
        self.not_counted: list[str] = []
        """What is in memory too, and in no part of the estimate."""

    def take(self, name: str, found: Any, otherwise: Any = None) -> Any:
        """The size `name`: `found` in a file (None = there is none). UserError where an option says it too."""
        given = getattr(self._options, name)
        flag = f"--{name.replace('_', '-')}"
        self._unread.discard(name)
        if found is not None:
            if given is not None:
                raise UserError(f"{flag} is for what is not there yet; this training's files and config say {found}, leave it "
                                "out")
            return found
        value = given if given is not None else (otherwise if otherwise is not None else DEFAULTS[name])
        if value is not None:
            self.assumed.append(f"{name.replace('_', ' ')} {value} ({flag})")
        return value

    def check_all_read(self) -> None:
        """UserError for an option that this training has no use for."""
        if self._unread:
            name = min(self._unread).replace("_", "-")
            raise UserError(f"--{name} is not read by this training; leave it out")


def shape_of(config: RunConfig, sizes: Sizes) -> tuple[dict[str, Any], int | None]:
    """What `plan_of` needs beside the config, and the rows of the data (None = unknown)."""
    if isinstance(config, Seq2SeqRunConfig):
        return _transformer(config, sizes)
    rows = sizes.take("rows", _pictures(config.data))  # type: ignore[attr-defined]
    if isinstance(config, MatcherRunConfig):
        return {"model": config.model.build(_text(config.text, sizes))}, rows
    return {}, rows


def _pictures(data: DataConfig) -> int | None:
    """How many there are; None where no data is."""
    return len(open_pictures(data, data.split)) if Path(data.path).exists() else None


def _transformer(config: Seq2SeqRunConfig, sizes: Sizes) -> tuple[dict[str, Any], int | None]:
    start = find_start(config.init_from, CONFIGS) if config.init_from else None
    named = config.image_tokenizer or (str(start.folder / IMAGE_FOLDER) if start else "")
    tokenizer = _image_tokenizer(named)
    index = read_index(config.data.path) if (Path(config.data.path) / INDEX_NAME).is_file() else None
    rows = None
    if index is not None:
        rows = choose(index.splits, config.data.split, f"split of {config.data.path}").rows
    elif config.data.on_the_fly:
        if tokenizer is not None:
            tokenizer.check_encodes(named)
        rows = _pictures(config.data)
    if start is not None:
        theirs = start.config()
        derived = {name: getattr(theirs, name) for name in DERIVED} | _sizes_of_start(theirs, sizes)
        if config.text.kind == FrozenTextEncoder.kind and not config.text.feature_cache:
            sizes.not_counted.append(_LIVE_ENCODER)
        return {"model": config.model.build(derived), "tokenizer": tokenizer}, sizes.take("rows", rows)
    grid: Any = None if tokenizer is None else tokenizer.grid
    codes = None if tokenizer is None else tokenizer.codebook_size
    if index is not None:
        grid, codes = index.grid, index.codebook_size
    sides = sizes.take("grid", grid)
    derived = {**_text(config.text, sizes, config.text.start_from), "codebook_size": sizes.take("codebook_size", codes),
               "grid": grid_of(sides) if isinstance(sides, str) else sides}
    layout = index.layout if index is not None and config.use_layout else None
    if layout is not None:
        derived |= {"layout_kind": layout.kind, "layout_classes": layout.classes, "layout_grid": layout.grid}
    return {"model": config.model.build(derived), "tokenizer": tokenizer}, sizes.take("rows", rows)


def _sizes_of_start(config: TransformerConfig, sizes: Sizes) -> dict[str, Any]:
    """Those that a folder of init_from says; an option that says one too is refused."""
    options = {"grid": "grid", "codebook_size": "codebook_size", "text_length": "text_length", "text_vocab_size": "vocab_size",
               "text_feature_width": "feature_width"}
    found = {name: getattr(config, name) for name in options}
    return {name: sizes.take(options[name], value) for name, value in found.items() if value is not None}


def _image_tokenizer(name: str) -> ImageTokenizerConfig | None:
    """Its config; None where no such folder is there."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return None
    kind = choose(IMAGE_TOKENIZERS, str(read_mapping(path).get("kind")), f"{path}: kind of image tokenizer")
    return read_config(Path(name), kind.kind, kind.config_class)


def _text(text: TextConfig, sizes: Sizes, start_from: str | None = None) -> dict[str, Any]:
    """What a model reads of captions."""
    if start_from is not None and Path(start_from).exists():
        tower = read_config(find_matcher_folder(start_from) / "matcher", Matcher.kind, MatcherConfig).text
        return {"text_vocab_size": sizes.take("vocab_size", tower.text_vocab_size) if tower.text_vocab_size else None,
                "text_feature_width": tower.text_feature_width, "text_length": sizes.take("text_length", tower.text_length)}
    if text.kind == FrozenTextEncoder.kind:
        if not text.feature_cache:
            sizes.not_counted.append(_LIVE_ENCODER)
        path = Path(text.encoder or "") / "config.json"
        known = read_mapping(path) if path.is_file() else {}
        width = known.get("hidden_size") or known.get("d_model")
        return {"text_feature_width": sizes.take("feature_width", width),
                "text_length": sizes.take("text_length", text.text_length)}
    if text.tokenizer and Path(text.tokenizer).exists():
        source = load_text_source(text.tokenizer)
        return {"text_vocab_size": sizes.take("vocab_size", source.vocab_size),
                "text_length": sizes.take("text_length", source.config.text_length)}
    if text.kind == ClassLabels.kind:
        return {"text_vocab_size": sizes.take("vocab_size", None, DEFAULT_CLASSES), "text_length": 1}
    return {"text_vocab_size": sizes.take("vocab_size", text.vocab_size), "text_length":
            sizes.take("text_length", text.text_length)}
