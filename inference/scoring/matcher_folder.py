"""The folder of a matcher, and loading of any scorer.

It holds matcher_index.json, matcher/, text_tokenizer/ and README.md. This is the one module that
knows its structure. It is written atomically; no pickle is ever read from it.
"""

# Axes: P images, M captions, E width of the shared space

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference.model_folder import INDEX_NAME as MODEL_INDEX_NAME
from inference.model_folder import (
    check_parts,
    check_schema_version,
    check_text_source,
    toolkit_version,
)
from inference.scoring.matcher import Matcher
from inference.scoring.scorer import ImageTextScorer
from inference.scoring.transformers_scorer import TransformersScorer
from seq2seq import FrozenTextEncoder, TextSource, load_text_source
from tokenizer_image.images import image_to_pixels, pixels_to_float, to_rgb
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.files import atomic_folder, write_json_atomic, write_text_atomic
from tokenloom_common.hub import MODEL_FILES, Pushable, resolve_folder
from tokenloom_common.model_card import CardFacts, model_card, read_card
from tokenloom_common.pretrained import write_pretrained

INDEX_NAME = "matcher_index.json"
CLASS_NAME = "Matcher"
SCHEMA_VERSION = 1
PARTS = ("matcher", "text_tokenizer")
SCORER_FILES = (*MODEL_FILES, "*.txt")  # CLIP's BPE keeps its merges in merges.txt
PIPELINE_TAG = "zero-shot-image-classification"
MATCHER_USAGE = """from tokenloom import TextToImage, load_matcher

matcher = load_matcher("path/or/hub-id")
matcher.scores([picture], ["a red heart", "a blue circle"])  # cosine similarity [1, 2]

model = TextToImage.from_pretrained("path/to/a/model", matcher="path/or/hub-id")
model.generate("a red heart", num_images=1, rerank_from=8)"""
"""The example of a model card."""


class MatcherScorer(ImageTextScorer, Pushable):
    """A matcher with its card and the text tokenizer (or encoder) that it was trained with."""

    def __init__(self, matcher: Matcher, text_source: TextSource, card: str | None = None) -> None:
        """Raise UserError if the two do not belong together."""
        check_text_source(text_source, matcher.config.text, "the matcher", "matcher")
        self.matcher = matcher.eval()
        self.text_source = text_source
        self.card = card

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole matcher folder, atomically, with the card that it came with."""
        card = self.card
        if not card:
            card = model_card(CardFacts(
                title="Matcher",
                summary="Saved with Tokenloom. Nothing is known here of its training.",
                usage=MATCHER_USAGE, pipeline_tag=PIPELINE_TAG))
        return save_matcher_folder(folder, self.matcher, self.text_source, card)

    @property
    def device(self) -> torch.device:
        """The matcher's device."""
        return self.matcher.logit_scale.device

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        side = self.matcher.config.image.resolution
        # [P, S, S, 3]
        pixels = numpy.stack([image_to_pixels(to_rgb(image), side) for image in images])
        return self.matcher.embed_images(pixels_to_float(pixels).to(self.device))

    def _embed_captions(self, captions: list[str]) -> Tensor:
        text = self.text_source.encode(captions)
        return self.matcher.embed_captions(text.text_input.to(self.device),
                                           text.text_mask.to(self.device))


def save_matcher_folder(folder: str | Path, matcher: Matcher, text_source: TextSource,
                        card: str) -> Path:
    """Write a whole matcher folder with its model card.

    UserError if the parts do not belong together.
    """
    check_text_source(text_source, matcher.config.text, "the matcher folder to write", "matcher")
    with atomic_folder(Path(folder), (*PARTS, INDEX_NAME, "README.md")) as aside:
        for part in PARTS:
            (aside / part).mkdir()
        write_pretrained(matcher.kind, matcher.config, matcher.state_dict(), aside / "matcher")
        text_source.write_files(aside / "text_tokenizer")
        write_text_atomic(aside / "README.md", card)
        write_json_atomic(aside / INDEX_NAME, {
            "_class_name": CLASS_NAME, "_tokenloom_version": toolkit_version(),
            "schema_version": SCHEMA_VERSION, "matcher": matcher.kind,
            "text_tokenizer": text_source.kind})
    return Path(folder)


def find_matcher_folder(name: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of one of our matchers, with its index checked.

    UserError or MissingFileError naming the file and the remedy.
    """
    folder = resolve_folder(name, revision, SCORER_FILES)
    path = folder / INDEX_NAME
    if not path.is_file():
        found = "this is not a (whole) matcher folder"
        if (folder / MODEL_INDEX_NAME).is_file():
            found = "it holds a text-to-image model"
        raise MissingFileError(f"{folder}: {INDEX_NAME} is missing, so {found}; "
                               "give the folder that train_matcher wrote as RUN/model")
    index = read_mapping(path)
    class_name = index.get("_class_name")
    if class_name != CLASS_NAME:
        raise UserError(f"{path}: _class_name is {class_name!r}, expected '{CLASS_NAME}'")
    check_schema_version(index, SCHEMA_VERSION, path)
    check_parts(folder, PARTS, "matcher folder")
    return folder


def load_matcher_folder(name: str | Path, device: str | torch.device = "cpu",
                        revision: str | None = None,
                        text_encoder: str | None = None) -> MatcherScorer:
    """Load one of our matchers by local folder or hub id, strictly, in eval mode.

    text_encoder: the frozen text encoder that it was trained with, if it has moved.
    """
    folder = find_matcher_folder(name, revision)
    matcher = Matcher.from_pretrained(folder / "matcher", device)
    text_source = load_text_source(folder / "text_tokenizer", text_encoder)
    if isinstance(text_source, FrozenTextEncoder):
        text_source.to(device)
    check_text_source(text_source, matcher.config.text, str(folder), "matcher")
    return MatcherScorer(matcher, text_source, read_card(folder))


def load_matcher(path: str | Path, device: str | torch.device | None = None,
                 revision: str | None = None, text_encoder: str | None = None) -> ImageTextScorer:
    """Load a scorer of images against captions: one of our matchers, or CLIP or SigLIP as
    `transformers` saves them.

    A local folder or a hub id; on the GPU if there is one and no device is named. `text_encoder` is
    for one of our matchers over a frozen text encoder that has moved. UserError for anything
    damaged, missing or of another kind.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve_folder(path, revision, SCORER_FILES)
    # a folder of neither kind: load_matcher_folder says what is missing
    if (folder / INDEX_NAME).is_file() or not TransformersScorer.is_one(folder):
        return load_matcher_folder(folder, chosen, text_encoder=text_encoder)
    if text_encoder is not None:
        raise UserError(f"{folder}: has a text encoder of its own; leave the text encoder out")
    return TransformersScorer.load(folder, chosen)
