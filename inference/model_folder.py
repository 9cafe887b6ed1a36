"""The model folder: model_index.json + tokenizer_image/ + seq2seq/ + text_tokenizer/, and
generation_config.json.

The one place that knows its layout. It is written whole or not at all; no pickle is ever read from
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from inference.sampling import SamplingParams
from seq2seq import KINDS as TRANSFORMER_KINDS
from seq2seq import TEXT_SOURCES, FrozenTextEncoder, ImageTransformer, TextSource, load_text_source
from tokenizer_image import KINDS, ImageTokenizer, load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError, choose
from tokenloom_common.files import atomic_folder, write_json_atomic, write_text_atomic
from tokenloom_common.model_card import CardFacts, model_card, read_card
from tokenloom_common.pretrained import PretrainedModule, resolve_folder, write_pretrained

INDEX_NAME = "model_index.json"
GENERATION_NAME = "generation_config.json"
CLASS_NAME = "TextToImage"
SCHEMA_VERSION = 1
PARTS = ("tokenizer_image", "seq2seq", "text_tokenizer")
USAGE = """from tokenloom import TextToImage

model = TextToImage.from_pretrained("path/or/hub-id")
model.generate("a red heart", num_images=4, seed=0).images[0].save("heart.png")"""
"""For a model card."""


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a model folder."""

    image_tokenizer: ImageTokenizer
    seq2seq: ImageTransformer
    text_tokenizer: TextSource
    generation: SamplingParams
    folder: Path
    card: str | None = None
    """The text of its README.md."""


def toolkit_version() -> str:
    """The installed version of Tokenloom."""
    try:
        return version("tokenloom")
    except PackageNotFoundError:
        return "unknown (not installed)"


class WrittenPart(Protocol):
    """What writes a part's folder without holding the part: its class, its config, and `write`."""

    @property
    def model_class(self) -> type[PretrainedModule]: ...
    @property
    def config(self) -> Any: ...
    def write(self, folder: Path) -> None: ...


def save_model_folder(folder: str | Path, image_tokenizer: ImageTokenizer, seq2seq: ImageTransformer,
                      text_tokenizer: TextSource, generation: SamplingParams, card: str) -> Path:
    """Write a whole model folder with its model card. UserError if the parts do not belong
    together.
    """
    return write_model_folder(folder, image_tokenizer, seq2seq, text_tokenizer, generation, card)


def write_model_folder(folder: str | Path, image_tokenizer: ImageTokenizer, seq2seq: ImageTransformer | WrittenPart,
                       text_tokenizer: TextSource, generation: SamplingParams, card: str) -> Path:
    """As save_model_folder, of a transformer that may be too large to hold."""
    check_pair(image_tokenizer, seq2seq, text_tokenizer, "the model folder to write")
    kind = seq2seq.kind if isinstance(seq2seq, ImageTransformer) else seq2seq.model_class.kind
    with atomic_folder(Path(folder), (*PARTS, INDEX_NAME, GENERATION_NAME, "README.md")) as aside:
        for name in PARTS:
            (aside / name).mkdir()
        write_pretrained(image_tokenizer.kind, image_tokenizer.config, image_tokenizer.state_dict(), aside / "tokenizer_image")
        if isinstance(seq2seq, ImageTransformer):
            write_pretrained(kind, seq2seq.config, seq2seq.state_dict(), aside / "seq2seq")
        else:
            seq2seq.write(aside / "seq2seq")
        text_tokenizer.write_files(aside / "text_tokenizer")
        write_json_atomic(aside / GENERATION_NAME, generation.plain())
        write_text_atomic(aside / "README.md", card)
        write_json_atomic(aside / INDEX_NAME, {
            "_class_name": CLASS_NAME, "_tokenloom_version": toolkit_version(), "schema_version": SCHEMA_VERSION,
            "tokenizer_image": image_tokenizer.kind, "seq2seq": kind, "text_tokenizer": text_tokenizer.kind})
    return Path(folder)


def save_loaded_model(folder: str | Path, parts: LoadedModel) -> Path:
    """Write loaded parts as a model folder again, with the card that they came with."""
    card = parts.card or model_card(CardFacts(
        title="Text-to-image model", summary="Saved with Tokenloom. Nothing is known here of its training.", usage=USAGE,
        pipeline_tag="text-to-image", tags=(parts.seq2seq.kind, parts.image_tokenizer.kind)))
    return save_model_folder(folder, parts.image_tokenizer, parts.seq2seq, parts.text_tokenizer, parts.generation, card)


def read_model_index(folder: Path) -> dict[str, str]:
    """model_index.json, checked; UserError or MissingFileError naming the file and the remedy."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise MissingFileError(f"{folder}: {INDEX_NAME} is missing, so this is not a (whole) model folder; "
                               "give the folder that training wrote as RUN/model")
    index = read_mapping(path)
    if index.get("_class_name") != CLASS_NAME:
        raise UserError(f"{path}: _class_name is {index.get('_class_name')!r}, expected '{CLASS_NAME}'; "
                        "models of other projects are converted first")
    if not isinstance(index.get("schema_version"), int) or not 1 <= index["schema_version"] <= SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {index.get('schema_version')!r} is not supported by this release")
    choose(TEXT_SOURCES, str(index.get("text_tokenizer")), f"{path}: kind of text tokenizer")
    if not (folder / GENERATION_NAME).is_file():
        raise MissingFileError(f"{folder}: {GENERATION_NAME} is missing, so the model folder is only half there; copy it again")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise MissingFileError(f"{folder}: {part}/ is missing, so the model folder is only half there; copy it again")
    return index


def load_model_folder(name: str | Path, device: str | torch.device = "cpu", revision: str | None = None,
                      text_encoder: str | None = None) -> LoadedModel:
    """Load a local model folder or a hub id, strictly, in eval mode. text_encoder: see
    TextToImage.from_pretrained.
    """
    folder = resolve_folder(name, revision)
    index = read_model_index(folder)
    where = f"{folder / INDEX_NAME}: "
    tokenizer_class = choose(KINDS, str(index.get("tokenizer_image")), f"{where}kind of image tokenizer")
    seq2seq_class = choose(TRANSFORMER_KINDS, str(index.get("seq2seq")), f"{where}kind of seq2seq model")
    image_tokenizer = tokenizer_class.from_pretrained(folder / "tokenizer_image", device)
    seq2seq = seq2seq_class.from_pretrained(folder / "seq2seq", device)
    text_tokenizer = load_text_source(folder / "text_tokenizer", text_encoder)
    if isinstance(text_tokenizer, FrozenTextEncoder):
        text_tokenizer.to(device)
    generation = SamplingParams.parse(read_mapping(folder / GENERATION_NAME), str(folder / GENERATION_NAME))
    check_pair(image_tokenizer, seq2seq, text_tokenizer, str(folder))
    return LoadedModel(image_tokenizer, seq2seq, text_tokenizer, generation, folder, read_card(folder))


def check_pair(image_tokenizer: ImageTokenizer, seq2seq: ImageTransformer | WrittenPart, text_tokenizer: TextSource,
               where: str) -> None:
    """UserError naming both sides when the parts do not belong together."""
    config = seq2seq.config
    pairs = [("codebook size", "image tokenizer", image_tokenizer.codebook_size, config.codebook_size),
             ("code grid", "image tokenizer", tuple(image_tokenizer.grid), tuple(config.grid)),
             ("vocabulary", "text tokenizer", text_tokenizer.vocab_size, config.text_vocab_size),
             ("width of features", "text tokenizer", text_tokenizer.feature_width, config.text_feature_width),
             ("text length", "text tokenizer", text_tokenizer.config.text_length, config.text_length)]
    if config.tokenizer_fingerprint:
        pairs.append(("codes (fingerprint)", "image tokenizer", code_fingerprint(image_tokenizer),
                      config.tokenizer_fingerprint))
    for what, part, theirs, ours in pairs:
        if theirs != ours:
            raise UserError(f"{where}: the {part} has {what} {theirs}, the transformer was trained for {ours}; "
                            f"use the {part} that it was trained with")


def load_image_tokenizer(name: str, device: str, revision: str | None = None) -> ImageTokenizer:
    """The image tokenizer of a model folder, or the one whose own folder is named."""
    folder = resolve_folder(name, revision)
    part = folder / PARTS[0] if (folder / INDEX_NAME).is_file() else folder
    return load_tokenizer(part, device)
