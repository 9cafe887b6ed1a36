"""Measure and show a trained model: reconstruction, loss with and without captions, samples."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image

from inference import TextToImage
from tokenizer_image.images import image_to_pixels
from training.data.sources.captioned_images import CaptionedImages
from training.evaluation.caption_accuracy import (
    Question,
    TrainingPictures,
    choose_questions,
    sample_questions,
)
from training.evaluation.image_metrics.pixel_metrics import psnr
from training.evaluation.real_images import caption_loss_sums
from training.evaluation.reconstruction import choose_rows, reconstructed_batches
from training.evaluation.sheets import labelled_grid, side_by_side

QUESTIONS = 100  # captions that are sampled and measured, if there is time
SHOWN = 24  # of these, in samples.png
LEAST_SHOWN = 8  # also where the time is over
MOST_REFERENCES = 20_000  # training images among which the nearest is looked for
SHOWN_RECONSTRUCTIONS = 8
SAMPLING_SHARE = 0.6  # of the time that is left for the report
MEASURED = 256  # images, of each split
BATCH = 32


@dataclass(frozen=True)
class Measured:
    """figures: for report.html and report.json; reconstructions: originals and what became of them.

    samples: the sheet.
    """

    figures: dict[str, Any]
    samples: Image.Image
    reconstructions: Image.Image


def measure_model(folder: Path, train: CaptionedImages, held_out: CaptionedImages | None, seed: int,
                  seconds: float) -> Measured:
    """Measure a model folder. seconds: that sampling may take, for more than the sheet."""
    model = TextToImage.from_pretrained(folder)
    measured_split = "held-out images" if held_out is not None else "training images"
    source = train if held_out is None else held_out
    rows = choose_rows(len(source), min(MEASURED, len(source)), seed)
    figures: dict[str, Any] = {"measured_on": measured_split, "images": len(rows)}
    figures |= _reconstruction(model, source, rows)
    figures |= _caption_loss(model, source, rows)
    sampled = _sample_known(model, train, seed, seconds)
    figures |= sampled.figures
    sections = [("captions of training images", sampled.cells)]
    if held_out is not None:
        count = max(LEAST_SHOWN // 2, min(SHOWN // 2, len(sampled.cells) // 2))
        questions = choose_questions(held_out, count, seed)
        images = sample_questions(model, questions, seed, "sample held-out captions")
        sections.append(("captions of held-out images", _cells(questions, images)))
    return Measured(figures, labelled_grid(sections), _reconstruction_sheet(model, source, rows))


def _reconstruction(model: TextToImage, source: CaptionedImages, rows: list[int]
                    ) -> dict[str, Any]:
    values = [psnr(batch.reconstruction, batch.original)
              for batch in reconstructed_batches(model.image_tokenizer, source, rows, BATCH,
                                                 Counter(), quiet=True)]
    return {"reconstruction_psnr": float(torch.cat(values).mean())}


def _caption_loss(model: TextToImage, source: CaptionedImages, rows: list[int]) -> dict[str, Any]:
    """Nats a token with each image's first caption, and with the null caption."""
    size = model.image_tokenizer.config.resolution
    sums = torch.zeros(2, model.seq2seq.config.num_tokens, dtype=torch.float64)
    for start in range(0, len(rows), BATCH):
        items = [source[row] for row in rows[start:start + BATCH]]
        pixels = numpy.stack([image_to_pixels(item.image, size) for item in items])
        captions = [item.captions[0] for item in items]
        sums += caption_loss_sums(model, torch.from_numpy(pixels), captions, None)
    given_caption, given_none = (sums / len(rows)).mean(dim=1).tolist()
    return {"loss": given_caption, "loss_without_caption": given_none,
            "captions_tell": given_none - given_caption}


class Sampled(NamedTuple):
    """figures: of the report; cells: captions and pictures of the sheet."""

    figures: dict[str, Any]
    cells: list[tuple[str, Image.Image]]


def _sample_known(model: TextToImage, train: CaptionedImages, seed: int, seconds: float) -> Sampled:
    """Sample captions of training images, as many as there is time for."""
    ends = time.perf_counter() + SAMPLING_SHARE * seconds
    questions = choose_questions(train, min(QUESTIONS, len(train)), seed)
    images: list[Image.Image] = []
    while len(images) < len(questions):
        started = time.perf_counter()
        some = questions[len(images):len(images) + LEAST_SHOWN]
        images += sample_questions(model, some, seed + len(images), "sample training captions",
                                   batch_size=LEAST_SHOWN)
        now = time.perf_counter()
        if now + (now - started) > ends:  # another batch would take too long
            break
    asked = questions[:len(images)]
    figures: dict[str, Any] = {"example": asked[0].caption}
    if len(train) <= MOST_REFERENCES:
        reference = TrainingPictures(train, model.image_tokenizer.config.resolution)
        score = reference.score(images, asked)
        figures |= {"caption_accuracy": score["accuracy"], "caption_accuracy_details": score}
    return Sampled(figures, _cells(asked, images)[:SHOWN])


def _cells(questions: list[Question], images: list[Image.Image]) -> list[tuple[str, Image.Image]]:
    return [(question.caption, image) for question, image in zip(questions, images, strict=True)]


def _reconstruction_sheet(model: TextToImage, source: CaptionedImages, rows: list[int]
                          ) -> Image.Image:
    shown = rows[:: max(1, len(rows) // SHOWN_RECONSTRUCTIONS)][:SHOWN_RECONSTRUCTIONS]
    (batch,) = reconstructed_batches(model.image_tokenizer, source, shown, BATCH, Counter(),
                                     quiet=True)
    values = psnr(batch.reconstruction, batch.original).tolist()
    return side_by_side([
        (f"{value:.1f} dB", original.numpy(), reconstruction.numpy())
        for value, original, reconstruction in zip(values, batch.original, batch.reconstruction,
                                                   strict=True)])
