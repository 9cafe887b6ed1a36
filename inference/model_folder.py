"""The model folder: reading and writing it whole.

It holds model_index.json, generation_config.json, tokenizer_image/, seq2seq/, text_tokenizer/,
README.md, and optionally concepts.json: what the model was trained on. This is the one module that
knows its structure. It is written atomically; no pickle is ever read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from inference.hooks.concepts_file import CONCEPTS_NAME, Concepts, folder_concepts
from inference.sampling import SamplingParams
from seq2seq import (
    TEXT_SOURCES,
    TRANSFORMER_KINDS,
    FrozenTextEncoder,
    ImageTransformer,
    TextSource,
    load_text_source,
)
from seq2seq.config import LayersConfig
from tokenizer_image import IMAGE_TOKENIZERS, ImageTokenizer, load_tokenizer
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
"""The example of a model card."""


@dataclass(frozen=True)
class LoadedModel:
    """The parts of a model folder."""

    image_tokenizer: ImageTokenizer
    seq2seq: ImageTransformer
    text_tokenizer: TextSource
    generation: SamplingParams
    folder: Path
    card: str | None = None  # the text of README.md
    concepts: Concepts | None = None  # of concepts.json, where there is one


def toolkit_version() -> str:
    """Return the installed version of Tokenloom."""
    try:
        return version("tokenloom")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown (not installed)"


class WrittenPart(Protocol):
    """A part that can write its folder without holding its weights in memory (a conversion)."""

    @property
    def model_class(self) -> type[PretrainedModule]: ...
    @property
    def config(self) -> Any: ...
    def write(self, folder: Path) -> None: ...


# ---- writing


def save_model_folder(folder: str | Path, image_tokenizer: ImageTokenizer,
                      seq2seq: ImageTransformer, text_tokenizer: TextSource,
                      generation: SamplingParams, card: str,
                      concepts: Concepts | None = None) -> Path:
    """Write a whole model folder with its model card.

    concepts: None keeps the concepts.json of the folder that is replaced, if it has one.
    UserError if the parts do not belong together.
    """
    return write_model_folder(folder, image_tokenizer, seq2seq, text_tokenizer, generation, card,
                              concepts)


def write_model_folder(folder: str | Path, image_tokenizer: ImageTokenizer,
                       seq2seq: ImageTransformer | WrittenPart, text_tokenizer: TextSource,
                       generation: SamplingParams, card: str,
                       concepts: Concepts | None = None) -> Path:
    """Do what save_model_folder does, also for a transformer that may be too large to hold."""
    check_pair(image_tokenizer, seq2seq, text_tokenizer, "the model folder to write")
    # a folder that holds anything else is not ours, and is not replaced
    names = (*PARTS, INDEX_NAME, GENERATION_NAME, CONCEPTS_NAME, "README.md")
    if concepts is None:  # built from the data by hand, and lost if a run's next export dropped it
        concepts = folder_concepts(Path(folder))
    with atomic_folder(Path(folder), names) as aside:
        for name in PARTS:
            (aside / name).mkdir()
        write_pretrained(image_tokenizer.kind, image_tokenizer.config, image_tokenizer.state_dict(),
                         aside / "tokenizer_image")
        if isinstance(seq2seq, ImageTransformer):
            kind = seq2seq.kind
            write_pretrained(kind, seq2seq.config, seq2seq.state_dict(), aside / "seq2seq")
        else:
            kind = seq2seq.model_class.kind
            seq2seq.write(aside / "seq2seq")
        text_tokenizer.write_files(aside / "text_tokenizer")
        write_json_atomic(aside / GENERATION_NAME, generation.plain())
        write_text_atomic(aside / "README.md", card)
        if concepts is not None:
            concepts.write(aside / CONCEPTS_NAME)
        # kinds alone: each part's config is in its own folder
        write_json_atomic(aside / INDEX_NAME, {
            "_class_name": CLASS_NAME, "_tokenloom_version": toolkit_version(),
            "schema_version": SCHEMA_VERSION, "tokenizer_image": image_tokenizer.kind,
            "seq2seq": kind, "text_tokenizer": text_tokenizer.kind})
    return Path(folder)


def save_loaded_model(folder: str | Path, parts: LoadedModel) -> Path:
    """Write loaded parts as a model folder again, with the card that they came with."""
    card = parts.card
    if not card:
        card = model_card(CardFacts(
            title="Text-to-image model",
            summary="Saved with Tokenloom. Nothing is known here of its training.", usage=USAGE,
            pipeline_tag="text-to-image", tags=(parts.seq2seq.kind, parts.image_tokenizer.kind)))
    return save_model_folder(folder, parts.image_tokenizer, parts.seq2seq, parts.text_tokenizer,
                             parts.generation, card, parts.concepts)


# ---- reading


def read_model_index(folder: Path) -> dict[str, str]:
    """Read and check model_index.json.

    UserError or MissingFileError naming the file and the remedy.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise MissingFileError(
            f"{folder}: {INDEX_NAME} is missing, so this is not a (whole) model folder; "
            "give the folder that training wrote as RUN/model")
    index = read_mapping(path)
    class_name = index.get("_class_name")
    if class_name != CLASS_NAME:
        raise UserError(f"{path}: _class_name is {class_name!r}, expected '{CLASS_NAME}'; "
                        "models of other projects are converted first")
    check_schema_version(index, SCHEMA_VERSION, path)
    choose(TEXT_SOURCES, str(index.get("text_tokenizer")), f"{path}: kind of text tokenizer")
    if not (folder / GENERATION_NAME).is_file():
        raise MissingFileError(f"{folder}: {GENERATION_NAME} is missing, "
                               "so the model folder is only half there; copy it again")
    check_parts(folder, PARTS, "model folder")
    return index


def check_schema_version(index: dict[str, Any], newest: int, path: Path) -> None:
    """Raise UserError for an index file of another release's schema."""
    version = index.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= newest:
        raise UserError(f"{path}: schema_version {version!r} is not supported by this release")


def check_parts(folder: Path, parts: Sequence[str], what: str) -> None:
    """Raise MissingFileError unless all part folders are there."""
    for part in parts:
        if not (folder / part).is_dir():
            raise MissingFileError(
                f"{folder}: {part}/ is missing, so the {what} is only half there; copy it again")


def load_model_folder(name: str | Path, device: str | torch.device = "cpu",
                      revision: str | None = None, text_encoder: str | None = None) -> LoadedModel:
    """Load a local model folder or a hub id, strictly, in eval mode.

    text_encoder: see TextToImage.from_pretrained.
    """
    folder = resolve_folder(name, revision)
    index = read_model_index(folder)
    path = folder / INDEX_NAME
    # both kinds and the concepts before any weights are read, which takes long
    concepts = folder_concepts(folder)
    tokenizer_class = choose(IMAGE_TOKENIZERS, str(index.get("tokenizer_image")),
                             f"{path}: kind of image tokenizer")
    seq2seq_class = choose(TRANSFORMER_KINDS, str(index.get("seq2seq")),
                           f"{path}: kind of seq2seq model")

    image_tokenizer = tokenizer_class.from_pretrained(folder / "tokenizer_image", device)
    seq2seq = seq2seq_class.from_pretrained(folder / "seq2seq", device)
    text_tokenizer = load_text_source(folder / "text_tokenizer", text_encoder)
    if isinstance(text_tokenizer, FrozenTextEncoder):  # the only text source with weights
        text_tokenizer.to(device)
    generation_file = folder / GENERATION_NAME
    generation = SamplingParams.parse(read_mapping(generation_file), str(generation_file))
    check_pair(image_tokenizer, seq2seq, text_tokenizer, str(folder))
    card = read_card(folder)
    return LoadedModel(image_tokenizer, seq2seq, text_tokenizer, generation, folder, card, concepts)


def check_pair(image_tokenizer: ImageTokenizer, seq2seq: ImageTransformer | WrittenPart,
               text_tokenizer: TextSource, where: str) -> None:
    """Raise UserError naming both sides if the parts do not belong together."""
    config = seq2seq.config
    check_trained_with(where, "image tokenizer", "transformer", [
        ("codebook size", image_tokenizer.codebook_size, config.codebook_size),
        ("code grid", tuple(image_tokenizer.grid), tuple(config.grid))])
    check_text_source(text_tokenizer, config, where, "transformer")
    # last, since it hashes the tokenizer's weights; only where the transformer knows its tokenizer
    if config.tokenizer_fingerprint:
        found = code_fingerprint(image_tokenizer)
        check_trained_with(where, "image tokenizer", "transformer", [
            ("codes (fingerprint)", found, config.tokenizer_fingerprint)])


def check_text_source(source: TextSource, config: LayersConfig, where: str, model: str) -> None:
    """Raise UserError unless `source` gives the text that this `model` was trained with."""
    check_trained_with(where, "text tokenizer", model, [
        ("vocabulary", source.vocab_size, config.text_vocab_size),
        ("width of features", source.feature_width, config.text_feature_width),
        ("text length", source.config.text_length, config.text_length)])


def check_trained_with(where: str, part: str, model: str,
                       facts: list[tuple[str, Any, Any]]) -> None:
    """Raise UserError for the first fact (name, found, expected by the model) that differs."""
    for name, found, expected in facts:
        if found != expected:
            raise UserError(f"{where}: the {part} has {name} {found}, the {model} was trained for "
                            f"{expected}; use the {part} that it was trained with")


def load_image_tokenizer(name: str, device: str, revision: str | None = None) -> ImageTokenizer:
    """Load the image tokenizer of a model folder, or the one whose own folder is named."""
    folder = resolve_folder(name, revision)
    if (folder / INDEX_NAME).is_file():
        folder = folder / "tokenizer_image"
    return load_tokenizer(folder, device)
