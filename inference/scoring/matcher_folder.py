"""The folder of a matcher: matcher_index.json + matcher/ + text_tokenizer/ + README.md; and whatever else can match.

The one place that knows its layout. It is written whole or not at all; no pickle is ever read from it.
"""

# Axes: P pictures, M captions, E width of the space that both share

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference.model_folder import INDEX_NAME as MODEL_INDEX_NAME
from inference.model_folder import toolkit_version
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
PIPELINE_TAG = "zero-shot-image-classification"
MATCHER_USAGE = """from tokenloom import TextToImage, load_matcher

matcher = load_matcher("path/or/hub-id")
matcher.scores([picture], ["a red heart", "a blue circle"])  # cosine similarity [1, 2]

model = TextToImage.from_pretrained("path/to/a/model", matcher="path/or/hub-id")
model.generate("a red heart", num_images=1, rerank_from=8)"""
"""For a model card."""


class MatcherScorer(ImageTextScorer, Pushable):
    """A matcher with the text tokenizer (or frozen text encoder) that it was trained with, and its model card."""

    def __init__(self, matcher: Matcher, text_source: TextSource, card: str | None = None) -> None:
        """UserError if the two do not belong together."""
        check_match(matcher, text_source, "the matcher")
        self.matcher, self.text_source, self.card = matcher.eval(), text_source, card

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the whole matcher folder, with the card that it came with; it appears whole."""
        card = self.card or model_card(CardFacts(
            title="Matcher", summary="Saved with Tokenloom. Nothing is known here of its training.", usage=MATCHER_USAGE,
            pipeline_tag=PIPELINE_TAG))
        return save_matcher_folder(folder, self.matcher, self.text_source, card)

    @property
    def device(self) -> torch.device:
        """Where the matcher is."""
        return self.matcher.logit_scale.device

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        side = self.matcher.config.image.resolution
        pixels = numpy.stack([image_to_pixels(to_rgb(image), side) for image in images])  # [P, S, S, 3]
        return self.matcher.embed_images(pixels_to_float(pixels).to(self.device))

    def _embed_captions(self, captions: list[str]) -> Tensor:
        return self.matcher.embed_captions(*(part.to(self.device) for part in self.text_source.encode(captions)))


def check_match(matcher: Matcher, text_source: TextSource, where: str) -> None:
    """UserError naming both sides when the text tokenizer is not the matcher's."""
    text = matcher.config.text
    for what, theirs, ours in (("vocabulary", text_source.vocab_size, text.text_vocab_size),
                               ("width of features", text_source.feature_width, text.text_feature_width),
                               ("text length", text_source.config.text_length, text.text_length)):
        if theirs != ours:
            raise UserError(f"{where}: the text tokenizer has {what} {theirs}, the matcher was trained for {ours}; "
                            "use the text tokenizer that it was trained with")


def save_matcher_folder(folder: str | Path, matcher: Matcher, text_source: TextSource, card: str) -> Path:
    """Write a whole matcher folder with its model card. UserError if the parts do not belong together."""
    check_match(matcher, text_source, "the matcher folder to write")
    with atomic_folder(Path(folder), (*PARTS, INDEX_NAME, "README.md")) as aside:
        for part in PARTS:
            (aside / part).mkdir()
        write_pretrained(matcher.kind, matcher.config, matcher.state_dict(), aside / "matcher")
        text_source.write_files(aside / "text_tokenizer")
        write_text_atomic(aside / "README.md", card)
        write_json_atomic(aside / INDEX_NAME, {
            "_class_name": CLASS_NAME, "_tokenloom_version": toolkit_version(), "schema_version": SCHEMA_VERSION,
            "matcher": matcher.kind, "text_tokenizer": text_source.kind})
    return Path(folder)


def find_matcher_folder(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a matcher of ours, its index checked. UserError or MissingFileError naming file and remedy."""
    folder = resolve_folder(name, revision, (*MODEL_FILES, "*.txt"))
    path = folder / INDEX_NAME
    if not path.is_file():
        remedy = ("it holds a text-to-image model" if (folder / MODEL_INDEX_NAME).is_file()
                  else "this is not a (whole) matcher folder")
        raise MissingFileError(f"{folder}: {INDEX_NAME} is missing, so {remedy}; give the folder that train_matcher wrote as "
                               "RUN/model")
    index = read_mapping(path)
    if index.get("_class_name") != CLASS_NAME:
        raise UserError(f"{path}: _class_name is {index.get('_class_name')!r}, expected '{CLASS_NAME}'")
    if not isinstance(index.get("schema_version"), int) or not 1 <= index["schema_version"] <= SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {index.get('schema_version')!r} is not supported by this release")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise MissingFileError(f"{folder}: {part}/ is missing, so the matcher folder is only half there; copy it again")
    return folder


def load_matcher_folder(name: str | Path, device: str | torch.device = "cpu", revision: str | None = None,
                        text_encoder: str | None = None) -> MatcherScorer:
    """Load a matcher of ours by local folder or hub id, strictly, in eval mode.

    text_encoder: where the frozen text encoder is that it was trained with, if not where it was.
    """
    folder = find_matcher_folder(name, revision)
    matcher = Matcher.from_pretrained(folder / "matcher", device)
    text_source = load_text_source(folder / "text_tokenizer", text_encoder)
    if isinstance(text_source, FrozenTextEncoder):
        text_source.to(device)
    check_match(matcher, text_source, str(folder))
    return MatcherScorer(matcher, text_source, read_card(folder))


def load_matcher(path: str | Path, device: str | torch.device | None = None, revision: str | None = None,
                 text_encoder: str | None = None) -> ImageTextScorer:
    """Load what scores pictures against captions: a matcher of ours, or CLIP or SigLIP as `transformers` saves them.

    A local folder or a hub id; on the GPU when there is one and no device is named. `text_encoder` is for a matcher of ours
    over a frozen text encoder that is no longer where it was. UserError on anything damaged, missing or of another kind.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve_folder(path, revision, (*MODEL_FILES, "*.txt"))
    if (folder / INDEX_NAME).is_file() or not TransformersScorer.is_one(folder):
        return load_matcher_folder(folder, chosen, text_encoder=text_encoder)
    if text_encoder is not None:
        raise UserError(f"{folder}: has a text encoder of its own; leave the text encoder out")
    return TransformersScorer.load(folder, chosen)
