"""Start a transformer from the weights of a trained or converted one: `init_from` of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from seq2seq import (
    TRANSFORMER_KINDS,
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
from training.warm_start.text_encoder import FREE, text_source_of_run

log = logging.getLogger(__name__)

# fields that follow from the image tokenizer, which check_codes compares, and from the text source
_IMAGE = ("codebook_size", "grid", "tokenizer_fingerprint")
_TEXT = ("text_vocab_size", "text_feature_width", "text_length")


def open_start(config: Seq2SeqRunConfig) -> StartFolder | None:
    """Find the folder that a fresh run starts from; None without init_from.

    UserError where the recipe names what the folder brings, or leaves out what it does not bring.
    """
    if config.init_from is None:
        return None
    start = find_start(config.init_from)
    # a fresh run would put aside the very folder that it starts from
    refuse_own_run(config.init_from, start.folder, config.run_dir)
    if start.whole:
        _check_text_of_folder(config, start)
    else:
        _check_tokenizers_named(config, start)
    return start


def _check_tokenizers_named(config: Seq2SeqRunConfig, start: StartFolder) -> None:
    text = config.text
    named = {"image_tokenizer": config.image_tokenizer,
             "text.tokenizer": text.tokenizer or text.kind == FrozenTextEncoder.kind}
    missing = [name for name, value in named.items() if not value]
    if missing:
        raise UserError(f"init_from {start.name}: a transformer alone, without tokenizers; name "
                        f"{' and '.join(missing)} that it was trained with, or give a whole model "
                        "folder")


def _check_text_of_folder(config: Seq2SeqRunConfig, start: StartFolder) -> None:
    text, folder = config.text, start.folder / TEXT_FOLDER
    kind = read_mapping(folder / "config.json").get("kind")
    if text.kind != kind:
        raise UserError(f"init_from {start.name}: its text.kind is {kind}, this run's "
                        f"{text.kind}; leave text.* out, or a recipe's with --text null")
    # all of these belong to the tokenizer itself, and would be ignored
    given = [name for name in ("tokenizer", "vocab_size", "text_length")
             if getattr(text, name) is not None]
    if kind == FrozenTextEncoder.kind:
        encoder = read_config(folder, kind, FrozenTextConfig)
        if encoder.padding != text.padding:
            given.append("padding")
    if given:
        raise UserError(f"init_from {start.name} brings its text tokenizer; leave text.{given[0]} "
                        "out, or a recipe's text.* with --text null")


def image_tokenizer_folder(config: Seq2SeqRunConfig, start: StartFolder | None) -> str:
    """Return the folder of the image tokenizer: as named, of init_from, or the run's own."""
    if config.image_tokenizer is not None:
        return config.image_tokenizer
    if start is not None:
        return str(start.folder / IMAGE_FOLDER)
    kept = Path(config.run_dir) / IMAGE_FOLDER
    if not kept.is_dir():
        raise MissingFileError(f"{kept}: the image tokenizer of the run that is continued is "
                               "missing; copy it there, or name it with image_tokenizer")
    return str(kept)


def text_source_of(config: Seq2SeqRunConfig, data: CaptionRows, start: StartFolder | None,
                   kept: Path | None) -> TextSource:
    """Load the text source of the model folder that a run starts from, or choose one.

    kept: the text source of the run that is continued.
    """
    if start is not None and start.whole:
        return load_text_source(start.folder / TEXT_FOLDER, config.text.encoder)
    # init_from's text tokenizer was copied into the run folder, which alone is needed now
    if config.init_from is not None and kept is not None:
        return load_text_source(kept, config.text.encoder)
    return text_source_of_run(config.text, data, kept)


def check_codes(start: StartFolder, tokenizer: ImageTokenizer, fingerprint: str,
                where: str) -> None:
    """Raise UserError where the transformer was trained for codes of another tokenizer.

    where: the folder of `tokenizer`, for the message.
    """
    trained = start.config()
    here = {"codebook_size": tokenizer.codebook_size, "grid": tuple(tokenizer.grid),
            "tokenizer_fingerprint": fingerprint}
    for name, value in here.items():
        there = getattr(trained, name)
        if there not in ("", value):  # a converted transformer alone has no fingerprint
            raise UserError(f"init_from {start.name}: {name} is {there} there and {value} here; "
                            f"{where} is not the image tokenizer that it was trained with: give "
                            "that one, and tokens of it")


def check_start(start: StartFolder, model: TransformerConfig) -> None:
    """Raise UserError where the run's model is another one than the folder's.

    Compares every field that weights or their meaning depend on, and names both values. Reads no
    weights, so that a run can be refused before anything is touched.
    """
    trained = start.config()
    if trained.kind != model.kind:
        raise UserError(f"init_from {start.name}: its model.kind is {trained.kind}, this run's "
                        f"{model.kind}; leave model.* out, or a recipe's with --model null")
    fields = [name for name in type(model).model_fields if name not in (*FREE, *_IMAGE)]
    # those that follow from the files first: they explain the others
    for name in sorted(fields, key=lambda name: name not in DERIVED):
        there, here = getattr(trained, name), getattr(model, name)
        if there != here:
            key = name if name in DERIVED else f"model.{name}"
            raise UserError(f"init_from {start.name}: {key} is {there} there and {here} here; "
                            f"{_remedy(name)}")


def _remedy(name: str) -> str:
    if name in _TEXT:
        return "name the text tokenizer that it was trained with"
    if name in DERIVED:
        return ("the layout of the token shards, and use_layout, must be those that it was trained "
                "with")
    return ("leave model.* out, or a recipe's with --model null "
            f"(only {', '.join(FREE)} may be another)")


def model_of_start(config: TransformerConfig, start: StartFolder) -> ImageTransformer:
    """Build a model with the weights of the folder, in float32 whatever their stored type.

    check_start comes before. UserError naming folder and tensors where the weights do not fit.
    """
    folder = start.transformer
    with SkipParameterInit():  # every weight is about to be replaced
        model = TRANSFORMER_KINDS[config.kind](config)
    tensors, own = read_tensors(folder), model.state_dict()
    check_tensors(_shapes(own), _shapes(tensors), folder)
    # whole numbers, as quantized files have, would be cast without a word
    check_numbers({name: tensor.dtype for name, tensor in own.items()}, tensors, folder)
    model.load_state_dict(tensors)

    numbers = sum(tensor.numel() for tensor in tensors.values())
    log.info("init_from %s: %s numbers of %d tensors taken over", start.name, f"{numbers:,}",
             len(tensors))
    return model


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
