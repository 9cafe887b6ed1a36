"""How well a text-to-image model does what captions ask: the loop over captions and what is measured in it.

The data's own pictures are measured in the same way beside the generated ones, and matcher and checker are also asked with
captions that belong to other pictures, so that each number stands between what is possible and what is chance.
"""

# Axes: P pictures, B batch, S pixels on a side, E width of the matcher's space, F features, M pictures of one caption,
# C concepts

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference import SamplingParams, TextToImage
from inference.scoring.scorer import ImageTextScorer
from seq2seq import TextBatch
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.config.encoding import LayoutConfig
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.tokens.layouts import Layouts
from training.evaluation.features import FeatureExtractor
from training.evaluation.metrics import Moments
from training.evaluation.questions import Question
from training.evaluation.reconstruction import Frechet, measure_frechet, preparation
from training.evaluation.reference import PictureHash, ReferenceStatistics
from training.evaluation.retrieval import retrieval_accuracy
from training.evaluation.scenes.captions import accuracy, parse_caption
from training.evaluation.scenes.reader import Seen, read_scene
from training.evaluation.token_loss import token_losses

SHOWN_PICTURES = 16


@dataclass(frozen=True)
class Judges:
    """Who looks at pictures; None, or False, for a judge who is not asked. reads_scenes: the captions are of the shapes data.

    reference: statistics of real pictures for the Frechet distance, in place of those of the captions' own pictures.
    """

    matcher: ImageTextScorer | None = None
    extractor: FeatureExtractor | None = None
    reads_scenes: bool = False
    reference: ReferenceStatistics | None = None

    @property
    def any(self) -> bool:
        """Whether anybody looks at pictures."""
        return self.matcher is not None or self.extractor is not None or self.reads_scenes


class Looked:
    """What the judges saw of pictures that came in batches; the pictures themselves are kept only to be shown."""

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self.shown: list[Image.Image] = []
        self.scenes: list[list[Seen]] = []
        self.moments = Moments(judges.extractor.dimensions if judges.extractor else 0)
        self._embeddings: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, pixels: Tensor) -> None:
        """Look at pixels uint8 [B, S, S, 3]."""
        judges, images = self._judges, [Image.fromarray(picture.numpy()) for picture in pixels]
        self.shown += images[: SHOWN_PICTURES - len(self.shown)]
        if judges.matcher is not None:
            self._embeddings.append(judges.matcher.embed_images(images))
        if judges.extractor is not None:
            features = judges.extractor(pixels)
            self.moments.update(features)
            self._features.append(features)
        if judges.reads_scenes:
            self.scenes += [read_scene(picture.numpy()) for picture in pixels]

    @property
    def embeddings(self) -> Tensor:
        """[P, E] float32 of length 1."""
        return torch.cat(self._embeddings)

    @property
    def directions(self) -> Tensor:
        """Features [P, F] scaled to length 1."""
        return torch.nn.functional.normalize(torch.cat(self._features), dim=1)


@dataclass(frozen=True)
class CaptionLoss:
    """In nats a token: given the caption, and given none. by_position [N]: given the caption, at each place of the raster."""

    pictures: int
    loss: float
    loss_without_caption: float
    by_position: list[float]


@dataclass(frozen=True)
class Real:
    """The data's own pictures: the questions whose picture could be read, what was seen of them, the loss of their tokens."""

    questions: list[Question]
    looked: Looked
    loss: CaptionLoss
    hashed: PictureHash
    unusable: Counter[str] = field(default_factory=Counter)


@torch.inference_mode()
def measure_real(model: TextToImage, source: CaptionedImages, questions: Sequence[Question], judges: Judges,
                 batch_size: int, layout_column: str) -> Real:
    """Look at the questions' own pictures and measure the model's loss on their tokens. DataError if fewer than two can be
    read: nothing could be compared."""
    looked, side = Looked(judges), model.image_tokenizer.config.resolution
    hashed = PictureHash(preparation(model.image_tokenizer, judges.extractor))
    layouts, unusable = _layouts(model, layout_column), Counter[str]()
    kept: list[Question] = []
    losses = torch.zeros(2, model.seq2seq.config.num_tokens, dtype=torch.float64)
    for start in progress(range(0, len(questions), batch_size), "measure the data's pictures", unit="batch"):
        pixels, given, asked = [], [], []
        for question in questions[start: start + batch_size]:
            try:
                square = image_to_pixels(source[question.row].image, side)
                given += [] if layouts is None else [layouts.of(source, question.row, square).astype(numpy.int64)]
            except BAD_ITEM_ERRORS as error:
                unusable[error.reason] += 1
                continue
            pixels.append(square)
            asked.append(question)
        if not asked:
            continue
        batch = torch.from_numpy(numpy.stack(pixels))
        hashed.update(batch)
        looked.add(batch)
        losses += _loss_sums(model, batch, [q.caption for q in asked], torch.from_numpy(numpy.stack(given)) if given else None)
        kept += asked
    if len(kept) < 2:
        raise DataError(f"{len(kept)} usable pictures to measure a generator on; it takes 2 or more")
    by_position, without = losses / len(kept)
    return Real(kept, looked, CaptionLoss(len(kept), float(by_position.mean()), float(without.mean()), by_position.tolist()),
                hashed, unusable)


def _layouts(model: TextToImage, column: str) -> Layouts | None:
    config = model.seq2seq.config
    if config.layout_grid is None or config.layout_kind is None:
        return None
    if config.layout_kind == "colors":
        return Layouts(LayoutConfig(kind="colors", grid=config.layout_grid))
    return Layouts(LayoutConfig(kind="classes", grid=config.layout_grid, classes=config.layout_classes, column=column))


def _loss_sums(model: TextToImage, pixels: Tensor, captions: list[str], layout: Tensor | None) -> Tensor:
    """Nats at each position, summed over a batch of pixels [B, S, S, 3], with and without the captions: [2, N] float64."""
    tokens = codes_to_tokens(model.image_tokenizer.encode(pixels_to_float(pixels).to(model.device)))  # [B, N]
    text = model.text_tokenizer.encode(captions)
    without = TextBatch(*(part.expand(len(captions), *part.shape[1:]) for part in model.text_tokenizer.null_for(text)))
    return torch.stack([token_losses(model.seq2seq, each, tokens, layout).sum(dim=0) for each in (text, without)])


def look_at_samples(model: TextToImage, questions: Sequence[Question], params: SamplingParams, judges: Judges,
                    batch_size: int) -> Looked:
    """Sample one picture a question and look at it."""
    looked = Looked(judges)
    with progress(None, f"sample at guidance {params.guidance_scale:g}", total=len(questions), unit="picture") as bar:
        for start in range(0, len(questions), batch_size):
            some = questions[start: start + batch_size]
            result = model.generate([q.caption for q in some], params=params, seed=[q.seed for q in some],
                                    batch_size=batch_size)
            looked.add(_pixels(result.images))
            bar.update(len(some))
    return looked


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))


# ---- numbers ----

def judge(looked: Looked, questions: Sequence[Question], judges: Judges, seed: int) -> dict[str, Any]:
    """What the matcher and the checker say of pictures, each with their own caption, and with another one (`shuffled`)."""
    captions = [question.caption for question in questions]
    other = shuffled(len(captions), seed)
    report: dict[str, Any] = {}
    if judges.matcher is not None:
        concepts = sorted({question.concept.casefold() for question in questions})
        pictures, texts = looked.embeddings, judges.matcher.embed_captions(captions)
        scores = pictures @ judges.matcher.embed_captions(concepts).T  # [P, C]
        right = torch.tensor([concepts.index(question.concept.casefold()) for question in questions])
        report["matcher_score"] = float((pictures * texts).sum(dim=1).mean())
        report["matcher_score_shuffled"] = float((pictures * texts[other]).sum(dim=1).mean())
        report["retrieval"] = {"concepts": len(concepts), **retrieval_accuracy(scores, right)}
    if judges.reads_scenes:
        asked = [parse_caption(caption) for caption in captions]
        report["composition"] = accuracy(looked.scenes, asked)
        report["composition_shuffled"] = accuracy(looked.scenes, [asked[place] for place in other])
    return report


def shuffled(count: int, seed: int) -> list[int]:
    """Places 0 to count - 1, each in another place than its own (except a single one)."""
    order = list(range(count))
    random.Random(f"{seed} shuffled").shuffle(order)
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [following[place] for place in range(count)]


def picture_retrieval(looked: Looked, real: Looked, questions: Sequence[Question]) -> dict[str, float]:
    """Share of pictures whose nearest real picture, by the cosine of their features, shows the concept that was asked for.

    chance: the same for a real picture chosen blindly. It needs no caption to be understood, so it is fair to models that
    read text in different ways.
    """
    nearest = (looked.directions @ real.directions.T).argmax(dim=1).tolist()
    counts = Counter(question.concept for question in questions)
    right = sum(questions[place].concept == question.concept for place, question in zip(nearest, questions, strict=True))
    return {"top1": right / len(questions), "chance": sum(n * n for n in counts.values()) / len(questions) ** 2}


def frechet(looked: Looked, real: Real, model: TextToImage, judges: Judges) -> Frechet:
    """Distance of the generated pictures' features from the real ones', or from the reference."""
    return measure_frechet(real.looked.moments, looked.moments, judges.reference, real.hashed,
                           preparation(model.image_tokenizer, judges.extractor))


@dataclass(frozen=True)
class Diversity:
    """Mean cosine distance of two pictures' features: of one caption, and of different concepts (None where all are one).
    shown: the first captions'."""

    captions: int
    images: int
    within: float
    between: float | None
    shown: list[tuple[str, list[Image.Image]]]


def diversity(model: TextToImage, questions: Sequence[Question], num_images: int, params: SamplingParams,
              extractor: FeatureExtractor, batch_size: int, shown: int = 4) -> Diversity:
    """Sample num_images (2 or more) pictures of each question and compare them."""
    kept: list[tuple[str, list[Image.Image]]] = []
    features = []  # [M, F] a question
    with progress(None, "sample several of a caption", total=len(questions), unit="caption") as bar:
        for question in questions:
            images = model.generate(question.caption, num_images, params, question.seed, batch_size).images
            kept += [(question.caption, images)] if len(kept) < shown else []
            features.append(torch.nn.functional.normalize(extractor(_pixels(images)), dim=1))
            bar.update(1)
    within = torch.stack([1 - _mean_of_pairs(some @ some.T) for some in features])
    first = torch.stack([some[0] for some in features])
    apart = torch.tensor([[a.concept != b.concept for b in questions] for a in questions])
    between = float((1 - first @ first.T)[apart].mean()) if bool(apart.any()) else None
    return Diversity(len(questions), num_images, float(within.mean()), between, kept)


def _mean_of_pairs(cosines: Tensor) -> Tensor:
    """Mean of [M, M] without its diagonal."""
    count = len(cosines)
    return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
