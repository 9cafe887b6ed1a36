"""The sizes of a planned run that its config leaves to its files.

They are read from files that are there, else given as options, else assumed; the estimate reports
what it assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from training.config.start_folders import CONFIGS, IMAGE_FOLDER, StartFolder, find_start
from training.config.text import TextConfig
from training.data.run_data import open_images
from training.data.text_input import DEFAULT_TEXT_LENGTH, DEFAULT_VOCAB_SIZE
from training.data.tokens.shards import INDEX_NAME, read_index

DEFAULTS: dict[str, Any] = {**PRESET_SIZES, "text_length": DEFAULT_TEXT_LENGTH,
                            "vocab_size": DEFAULT_VOCAB_SIZE, "feature_width": 768, "rows": None}
"""Size -> what is assumed where neither an option nor a file says it.

768 is the width of T5's and BERT's base models.
"""
DEFAULT_CLASSES = 1000  # ImageNet's
LIVE_ENCODER = ("the frozen text encoder, which encodes captions as they come "
                "(no text.feature_cache)")


@dataclass(frozen=True)
class GivenSizes:
    """Sizes that the user gives for files that are not there yet; None = not given."""

    grid: str | None = None
    codebook_size: int | None = None
    text_length: int | None = None
    vocab_size: int | None = None
    feature_width: int | None = None
    rows: int | None = None


class Sizes:
    """Resolve sizes from files, the user's options and defaults, and note what was assumed."""

    def __init__(self, given: GivenSizes) -> None:
        self._given = asdict(given)
        # an option that nothing reads is refused at the end: it would be ignored in silence
        self._unread = {name for name, value in self._given.items() if value is not None}
        self.assumed: list[str] = []
        """A sentence for each size that no file says."""
        self.not_counted: list[str] = []
        """Models that are in memory too, and in no part of the estimate."""

    def resolve(self, name: str, found: Any, default: Any = None) -> Any:
        """Return the size `name`: `found` in a file (None = in no file), else given, else assumed.

        UserError where an option gives a size that a file says too.
        """
        given = self._given[name]
        flag = f"--{name.replace('_', '-')}"
        self._unread.discard(name)

        if found is not None:
            if given is not None:
                raise UserError(f"{flag} is for what is not there yet; this run's files and config "
                                f"say {found}, leave it out")
            return found

        value = given
        if value is None:
            value = DEFAULTS[name] if default is None else default
        if value is not None:  # None: unknown rows, so no epochs either
            self.assumed.append(f"{name.replace('_', ' ')} {value} ({flag})")
        return value

    def check_all_read(self) -> None:
        """UserError for an option that this run has no use for."""
        if self._unread:
            name = min(self._unread).replace("_", "-")
            raise UserError(f"--{name} is not read by this run; leave it out")


@dataclass(frozen=True)
class RunSizes:
    """The input of `plan_of` beside the run's config, and the rows of its data (None = unknown)."""

    rows: int | None
    model: TransformerConfig | MatcherConfig | None = None
    tokenizer: ImageTokenizerConfig | None = None


def sizes_of_run(config: RunConfig, sizes: Sizes) -> RunSizes:
    """Resolve all sizes that the run's config does not say."""
    if isinstance(config, Seq2SeqRunConfig):
        return _transformer_sizes(config, sizes)
    rows = sizes.resolve("rows", _count_images(config.data))  # type: ignore[attr-defined]
    if isinstance(config, MatcherRunConfig):
        return RunSizes(rows, config.model.build(_text_sizes(config.text, sizes)))
    return RunSizes(rows)


def _count_images(data: DataConfig) -> int | None:
    """The number of images in the data; None where no data is there."""
    return len(open_images(data, data.split)) if Path(data.path).exists() else None


def _transformer_sizes(config: Seq2SeqRunConfig, sizes: Sizes) -> RunSizes:
    start = find_start(config.init_from, CONFIGS) if config.init_from else None
    tokenizer_name = config.image_tokenizer or (str(start.folder / IMAGE_FOLDER) if start else "")
    tokenizer = _image_tokenizer(tokenizer_name)

    # token shards say themselves what made them; images only say how many there are
    index = None
    rows = None
    if (Path(config.data.path) / INDEX_NAME).is_file():
        index = read_index(config.data.path)
        rows = choose(index.splits, config.data.split, f"split of {config.data.path}").rows
    elif config.data.on_the_fly:
        if tokenizer is not None:
            tokenizer.check_encodes(tokenizer_name)
        rows = _count_images(config.data)

    if start is not None:
        derived = _sizes_of_start(config, start, sizes)
        model = config.model.build(derived)
        return RunSizes(sizes.resolve("rows", rows), model, tokenizer)

    # the index of token shards counts more than the tokenizer's folder: it is what will be read
    grid: Any = None
    codes = None
    if index is not None:
        grid, codes = index.grid, index.codebook_size
    elif tokenizer is not None:
        grid, codes = tokenizer.grid, tokenizer.codebook_size
    grid = sizes.resolve("grid", grid)
    derived = {**_text_sizes(config.text, sizes, config.text.start_from),
               "codebook_size": sizes.resolve("codebook_size", codes),
               "grid": grid_of(grid) if isinstance(grid, str) else grid}
    if index is not None and index.layout is not None and config.use_layout:
        layout = index.layout
        derived |= {"layout_kind": layout.kind, "layout_classes": layout.classes,
                    "layout_grid": layout.grid}

    model = config.model.build(derived)
    return RunSizes(sizes.resolve("rows", rows), model, tokenizer)


OPTION_OF_FIELD = {"grid": "grid", "codebook_size": "codebook_size", "text_length": "text_length",
                   "text_vocab_size": "vocab_size", "text_feature_width": "feature_width"}
"""Derived field of a transformer -> the size that is given for it."""


def _sizes_of_start(config: Seq2SeqRunConfig, start: StartFolder, sizes: Sizes) -> dict[str, Any]:
    """Read the derived fields from init_from; an option that gives one too is refused."""
    model = start.config()
    derived = {name: getattr(model, name) for name in DERIVED}
    for field, option in OPTION_OF_FIELD.items():
        if derived[field] is not None:  # text has ids or features: one of the two is None
            derived[field] = sizes.resolve(option, derived[field])
    if config.text.kind == FrozenTextEncoder.kind and not config.text.feature_cache:
        sizes.not_counted.append(LIVE_ENCODER)
    return derived


def _image_tokenizer(name: str) -> ImageTokenizerConfig | None:
    """Read an image tokenizer's config; None where no such folder is there."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return None
    name_of_kind = str(read_mapping(path).get("kind"))
    kind = choose(IMAGE_TOKENIZERS, name_of_kind, f"{path}: kind of image tokenizer")
    return read_config(Path(name), kind.kind, kind.config_class)


def _text_sizes(text: TextConfig, sizes: Sizes, start_from: str | None = None) -> dict[str, Any]:
    """Resolve the derived fields that are about captions."""
    if start_from is not None and Path(start_from).exists():
        folder = find_matcher_folder(start_from) / "matcher"
        tower = read_config(folder, Matcher.kind, MatcherConfig).text
        vocab_size = tower.text_vocab_size
        if vocab_size:
            vocab_size = sizes.resolve("vocab_size", vocab_size)
        return {"text_vocab_size": vocab_size, "text_feature_width": tower.text_feature_width,
                "text_length": sizes.resolve("text_length", tower.text_length)}

    if text.kind == FrozenTextEncoder.kind:
        if not text.feature_cache:
            sizes.not_counted.append(LIVE_ENCODER)
        path = Path(text.encoder or "") / "config.json"
        encoder = read_mapping(path) if path.is_file() else {}
        width = encoder.get("hidden_size") or encoder.get("d_model")  # BERT's and T5's name for it
        return {"text_feature_width": sizes.resolve("feature_width", width),
                "text_length": sizes.resolve("text_length", text.text_length)}

    if text.tokenizer and Path(text.tokenizer).exists():
        source = load_text_source(text.tokenizer)
        return {"text_vocab_size": sizes.resolve("vocab_size", source.vocab_size),
                "text_length": sizes.resolve("text_length", source.config.text_length)}

    if text.kind == ClassLabels.kind:  # a class is a text of one id
        classes = sizes.resolve("vocab_size", None, DEFAULT_CLASSES)
        return {"text_vocab_size": classes, "text_length": 1}
    return {"text_vocab_size": sizes.resolve("vocab_size", text.vocab_size),
            "text_length": sizes.resolve("text_length", text.text_length)}
