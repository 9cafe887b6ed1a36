"""Begin a transformer's training with the weights of a trained or converted one: `init_from` of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path

from seq2seq import (
    KINDS,
    FrozenTextConfig,
    FrozenTextEncoder,
    ImageTransformer,
    TextSource,
    TransformerConfig,
    load_text_source,
)
from seq2seq.config import DERIVED
from tokenizer_image import ImageTokenizer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.pretrained import SkipParameterInit, read_config
from tokenloom_common.weights import check_numbers, check_tensors, read_tensors
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.start_folders import (
    IMAGE_FOLDER,
    TEXT_FOLDER,
    StartFolder,
    find_start,
    refuse_own_run,
)
from training.data.text_input import CaptionRows
from training.warm_start.text_encoder import text_source_of_run

log = logging.getLogger(__name__)

_FREE = ("dropout",)  # has no weights, and is each run's own choice
_IMAGE = ("codebook_size", "grid", "tokenizer_fingerprint")
_TEXT = ("text_vocab_size", "text_feature_width", "text_length")


def open_start(config: Seq2SeqRunConfig) -> StartFolder | None:
    """The folder that a fresh run begins from; None without init_from. UserError where the recipe says what the folder brings,
    or leaves out what it does not bring."""
    if config.init_from is None:
        return None
    start, text = find_start(config.init_from), config.text
    refuse_own_run(config.init_from, start.folder, config.run_dir)
    if not start.whole:
        named = {"image_tokenizer": config.image_tokenizer,
                 "text.tokenizer": text.tokenizer or text.kind == FrozenTextEncoder.kind}
        lacks = [name for name, value in named.items() if not value]
        if lacks:
            raise UserError(f"init_from {start.name}: a transformer alone, without tokenizers; name {' and '.join(lacks)} that "
                            "it was trained with, or give a whole model folder")
        return start
    given = [name for name in ("tokenizer", "vocab_size", "text_length") if getattr(text, name) is not None]
    kind = read_mapping(start.folder / TEXT_FOLDER / "config.json").get("kind")
    if text.kind != kind:
        raise UserError(f"init_from {start.name}: its text.kind is {kind}, this run's {text.kind}; leave text.* out, or "
                        "a recipe's with --text null")
    if kind == FrozenTextEncoder.kind:
        padding = read_config(start.folder / TEXT_FOLDER, kind, FrozenTextConfig).padding
        given += [] if padding == text.padding else ["padding"]
    if given:
        raise UserError(f"init_from {start.name} brings its text tokenizer; leave text.{given[0]} out, or a recipe's text.* "
                        "with --text null")
    return start


def image_tokenizer_folder(config: Seq2SeqRunConfig, start: StartFolder | None) -> str:
    """Where the image tokenizer of a run is: as named, else beside the transformer that it begins from, else, where it goes
    on, in its own folder."""
    if config.image_tokenizer is not None:
        return config.image_tokenizer
    if start is not None:
        return str(start.folder / IMAGE_FOLDER)
    kept = Path(config.run_dir) / IMAGE_FOLDER
    if not kept.is_dir():
        raise MissingFileError(f"{kept}: the image tokenizer of the run that is continued is missing; copy it there, or name "
                               "it with image_tokenizer")
    return str(kept)


def text_source_of(config: Seq2SeqRunConfig, data: CaptionRows, start: StartFolder | None,
                   kept: Path | None) -> TextSource:
    """What a run reads its captions with: the text tokenizer of the model folder that it begins from, or as text_source_of_run
    says. `kept` is where the run that is continued has it."""
    if start is not None and start.whole:
        return load_text_source(start.folder / TEXT_FOLDER, config.text.encoder)
    if config.init_from is not None and kept is not None:
        return load_text_source(kept, config.text.encoder)
    return text_source_of_run(config.text, data, kept)


def check_codes(start: StartFolder, tokenizer: ImageTokenizer, fingerprint: str, where: str) -> None:
    """UserError, naming both values, when the folder's transformer was trained for codes of another image tokenizer than the
    one at `where`."""
    theirs = start.config()
    here = {"codebook_size": tokenizer.codebook_size, "grid": tuple(tokenizer.grid), "tokenizer_fingerprint": fingerprint}
    for name, value in here.items():
        there = getattr(theirs, name)
        if there not in ("", value):  # models from before fingerprints have none
            raise UserError(f"init_from {start.name}: {name} is {there} there and {value} here; {where} is not the image "
                            "tokenizer that it was trained with: give that one, and tokens of it")


def check_start(start: StartFolder, ours: TransformerConfig) -> None:
    """UserError, naming the field and both values, when the run's model is another one than the folder's in anything that its
    weights or their meaning depend on. Reads no weights, so it can be asked before anything is touched."""
    theirs = start.config()
    if theirs.kind != ours.kind:
        raise UserError(f"init_from {start.name}: its model.kind is {theirs.kind}, this run's {ours.kind}; leave model.* out, "
                        "or a recipe's with --model null")
    fields = [name for name in type(ours).model_fields if name not in (*_FREE, *_IMAGE)]
    for name in sorted(fields, key=lambda name: name not in DERIVED):  # what follows from the files explains more
        there, here = getattr(theirs, name), getattr(ours, name)
        if there != here:
            what = name if name in DERIVED else f"model.{name}"
            raise UserError(f"init_from {start.name}: {what} is {there} there and {here} here; {_remedy(name)}")


def _remedy(name: str) -> str:
    if name in _TEXT:
        return "name the text tokenizer that it was trained with"
    if name in DERIVED:
        return "the layout of the token shards, and use_layout, must be those that it was trained with"
    return f"leave model.* out, or a recipe's with --model null (only {', '.join(_FREE)} may be another)"


def model_of_start(config: TransformerConfig, start: StartFolder) -> ImageTransformer:
    """A model of this config with the weights of the folder, in float32 whatever they are stored in. check_start comes before.

    UserError naming folder and tensors where the weights do not fit.
    """
    folder = start.transformer
    with SkipParameterInit():
        model = KINDS[config.kind](config)
    tensors = read_tensors(folder)
    own = model.state_dict()
    ours, theirs = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, tensors))
    check_tensors(ours, theirs, folder)
    check_numbers({name: tensor.dtype for name, tensor in own.items()}, tensors, folder)
    model.load_state_dict(tensors)
    log.info("init_from %s: %s numbers of %d tensors taken over", start.name,
             f"{sum(tensor.numel() for tensor in tensors.values()):,}", len(tensors))
    return model
