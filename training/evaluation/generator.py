"""How well a text-to-image model follows captions: sampling, and the metrics of what it sampled.

The data's own images are measured in the same way beside the generated ones, and matcher and
checker are also asked with captions that belong to other images, so that each number stands
between what is possible and what is chance.
"""

# Axes: P images, S pixels on a side, F features, M images of one caption, C concepts

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from inference import SamplingParams, TextToImage
from inference.scoring.scorer import ImageTextScorer
from tokenloom_common.progress import progress
from training.evaluation.image_metrics.features import FeatureExtractor
from training.evaluation.image_metrics.frechet import Frechet, measure_frechet, preparation
from training.evaluation.observations import Observations
from training.evaluation.questions import Question
from training.evaluation.real_images import RealImages
from training.evaluation.retrieval import retrieval_accuracy
from training.evaluation.scenes.captions import accuracy, parse_caption
from training.evaluation.scorers import Scorers

SHOWN_CAPTIONS = 4  # of those that are sampled several times


def observe_samples(model: TextToImage, questions: Sequence[Question], params: SamplingParams,
                    scorers: Scorers, batch_size: int) -> Observations:
    """Sample one image per question and observe it."""
    observations = Observations(scorers)
    what = f"sample at guidance {params.guidance_scale:g}"
    with progress(None, what, total=len(questions), unit="picture") as bar:
        for start in range(0, len(questions), batch_size):
            batch = questions[start: start + batch_size]
            captions = [question.caption for question in batch]
            seeds = [question.seed for question in batch]
            # a seed of its own for each: no image depends on how they are batched
            result = model.generate(captions, params=params, seed=seeds, batch_size=batch_size)
            observations.add(_pixels(result.images))
            bar.update(len(batch))
    return observations


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images as uint8 [P, S, S, 3]."""
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))


# ---- metrics ----

def alignment_metrics(observations: Observations, questions: Sequence[Question], scorers: Scorers,
                      seed: int) -> dict[str, Any]:
    """Measure how well images fit their captions, by the matcher and by the scenes read.

    Entries that end in `_shuffled` are the same with a caption of another image: chance level.
    """
    captions = [question.caption for question in questions]
    others = shuffled(len(captions), seed)
    report: dict[str, Any] = {}
    if scorers.matcher is not None:
        report |= _matcher_metrics(scorers.matcher, observations, questions, others)
    if scorers.training is not None:
        concepts = [question.concept for question in questions]
        report["caption_accuracy"] = scorers.training.score_features(observations.small_images,
                                                                     concepts)
    if scorers.reads_scenes:
        wanted = [parse_caption(caption) for caption in captions]
        wanted_elsewhere = [wanted[place] for place in others]
        report["composition"] = accuracy(observations.scenes, wanted)
        report["composition_shuffled"] = accuracy(observations.scenes, wanted_elsewhere)
    return report


def _matcher_metrics(matcher: ImageTextScorer, observations: Observations,
                     questions: Sequence[Question], others: list[int]) -> dict[str, Any]:
    """Cosine of each image with its caption and with another's, and retrieval of its concept."""
    images = observations.embeddings  # [P, E]
    texts = matcher.embed_captions([question.caption for question in questions])

    # retrieval among concepts, not captions: several captions are right for one image
    concept_of = [question.concept.casefold() for question in questions]
    concepts = sorted(set(concept_of))
    scores = images @ matcher.embed_captions(concepts).T  # [P, C]
    right = torch.tensor([concepts.index(concept) for concept in concept_of])
    # both embeddings have length 1, so that products are cosines
    own_cosines = (images * texts).sum(dim=1)  # [P]
    other_cosines = (images * texts[others]).sum(dim=1)
    return {
        "matcher_score": float(own_cosines.mean()),
        "matcher_score_shuffled": float(other_cosines.mean()),
        "retrieval": {"concepts": len(concepts), **retrieval_accuracy(scores, right)},
    }


def shuffled(count: int, seed: int) -> list[int]:
    """Permute 0 to count - 1 so that none stays in its place (except a single one)."""
    order = list(range(count))
    random.Random(f"{seed} shuffled").shuffle(order)
    # one cycle through all: a plain shuffle would leave some captions with their own image
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [following[place] for place in range(count)]


def image_retrieval(observations: Observations, real: Observations,
                    questions: Sequence[Question]) -> dict[str, float]:
    """Share of images whose nearest real image, by cosine of features, shows the right concept.

    chance: the same for a real image chosen blindly. No caption has to be understood, so it is
    fair to models that read text in different ways.
    """
    cosines = observations.directions @ real.directions.T  # [P, P]
    nearest = cosines.argmax(dim=1).tolist()
    concepts = [question.concept for question in questions]
    hits = [concepts[place] == concept for place, concept in zip(nearest, concepts, strict=True)]

    # chance: a concept with n of the images is asked for n times, and n of the real ones show it
    total = len(questions)
    same_concept_pairs = sum(count * count for count in Counter(concepts).values())
    return {"top1": sum(hits) / total, "chance": same_concept_pairs / total**2}


def generator_frechet(observations: Observations, real: RealImages, model: TextToImage,
                      scorers: Scorers) -> Frechet:
    """Measure the Frechet distance of generated images from real ones, or from the reference."""
    prepared = preparation(model.image_tokenizer, scorers.extractor)
    return measure_frechet(real.observations.moments, observations.moments, scorers.reference,
                           real.image_hash, prepared)


@dataclass(frozen=True)
class Diversity:
    """Mean cosine distance between the features of two images.

    within: of one caption. between: of different concepts; None if all have the same one.
    shown: images of the first captions.
    """

    captions: int
    images: int
    within: float
    between: float | None
    shown: list[tuple[str, list[Image.Image]]]


def diversity(model: TextToImage, questions: Sequence[Question], num_images: int,
              params: SamplingParams, extractor: FeatureExtractor, batch_size: int) -> Diversity:
    """Sample num_images (2 or more) images of each question and compare them."""
    shown: list[tuple[str, list[Image.Image]]] = []
    features = []  # [M, F] of each question
    with progress(None, "sample several of a caption", total=len(questions), unit="caption") as bar:
        for question in questions:
            # the first of them is the image that was observed before: it has the question's seed
            result = model.generate(question.caption, num_images, params, question.seed, batch_size)
            if len(shown) < SHOWN_CAPTIONS:
                shown.append((question.caption, result.images))
            features.append(_directions(extractor, result.images))
            bar.update(1)

    within = torch.stack([1 - _mean_of_pairs(own @ own.T) for own in features])
    first = torch.stack([own[0] for own in features])  # [captions, F]: one image of each is enough
    concepts = [question.concept for question in questions]
    differ = torch.tensor([[one != other for other in concepts] for one in concepts])
    between = None
    if bool(differ.any()):  # the mean of nothing would be nan, which JSON has not
        distances = 1 - first @ first.T
        between = float(distances[differ].mean())
    return Diversity(len(questions), num_images, float(within.mean()), between, shown)


def _directions(extractor: FeatureExtractor, images: Sequence[Image.Image]) -> Tensor:
    """Features [M, F] scaled to length 1."""
    return torch.nn.functional.normalize(extractor(_pixels(images)), dim=1)


def _mean_of_pairs(cosines: Tensor) -> Tensor:
    """Mean of [M, M] without its diagonal."""
    count = len(cosines)
    off_diagonal = cosines.sum() - cosines.diagonal().sum()  # an image with itself says nothing
    return off_diagonal / (count * (count - 1))
