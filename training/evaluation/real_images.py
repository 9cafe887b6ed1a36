"""The data's own images in the evaluation of a generator, and the loss of their tokens."""

# Axes: B batch, S pixels on a side, N image tokens, L layout tokens

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from inference import TextToImage
from seq2seq import TextBatch
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.config.encoding import LayoutConfig
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.tokens.layouts import Layouts
from training.evaluation.image_metrics.frechet import preparation
from training.evaluation.image_metrics.reference import ImageHash
from training.evaluation.observations import Observations
from training.evaluation.questions import Question
from training.evaluation.scorers import Scorers
from training.evaluation.token_loss import token_losses


@dataclass(frozen=True)
class CaptionLoss:
    """Cross entropy in nats per token, given the caption and given the null caption.

    by_position [N]: given the caption, at each position of the raster.
    """

    pictures: int
    loss: float
    loss_without_caption: float
    by_position: list[float]


@dataclass(frozen=True)
class RealImages:
    """Measurements of the data's own images.

    questions: those whose image could be read. image_hash: over these images.
    """

    questions: list[Question]
    observations: Observations
    loss: CaptionLoss
    image_hash: ImageHash
    unusable: Counter[str] = field(default_factory=Counter)


class _Batch(NamedTuple):
    questions: list[Question]
    pixels: Tensor  # uint8 [B, S, S, 3]
    layouts: Tensor | None  # int64 [B, L]


@torch.inference_mode()
def measure_real_images(model: TextToImage, source: CaptionedImages, questions: Sequence[Question],
                        scorers: Scorers, batch_size: int, layout_column: str) -> RealImages:
    """Observe the questions' own images, and measure the model's loss on their tokens.

    layout_column: column of layout classes, for models with such a layout.
    DataError if fewer than two images can be read: there would be nothing to compare.
    """
    observations = Observations(scorers)
    image_hash = ImageHash(preparation(model.image_tokenizer, scorers.extractor))
    layouts = _layouts(model, layout_column)
    unusable: Counter[str] = Counter()
    usable: list[Question] = []
    # per position, with the caption and without: sums, since batches may lose unusable images
    loss_sums = torch.zeros(2, model.seq2seq.config.num_tokens, dtype=torch.float64)  # [2, N]
    starts = range(0, len(questions), batch_size)
    side = model.image_tokenizer.config.resolution
    for start in progress(starts, "measure the data's pictures", unit="batch"):
        batch = _read_batch(source, questions[start: start + batch_size], side, layouts, unusable)
        if batch is None:
            continue
        image_hash.update(batch.pixels)
        observations.add(batch.pixels)
        captions = [question.caption for question in batch.questions]
        loss_sums += caption_loss_sums(model, batch.pixels, captions, batch.layouts)
        usable += batch.questions

    if len(usable) < 2:
        raise DataError(f"{len(usable)} usable pictures to measure a generator on; it takes 2 or "
                        "more")
    by_position, without_caption = loss_sums / len(usable)
    loss = CaptionLoss(len(usable), float(by_position.mean()), float(without_caption.mean()),
                       by_position.tolist())
    return RealImages(usable, observations, loss, image_hash, unusable)


def _read_batch(source: CaptionedImages, questions: Sequence[Question], side: int,
                layouts: Layouts | None, unusable: Counter[str]) -> _Batch | None:
    """Read the questions' images and layouts; None if not one of them is usable."""
    kept = []
    pixels = []
    given = []
    for question in questions:
        try:
            square = image_to_pixels(source[question.row].image, side)  # uint8 [S, S, 3]
            if layouts is not None:
                layout = layouts.image_layout(source, question.row, square)
                given.append(torch.from_numpy(layout.astype(numpy.int64)))
        except BAD_ITEM_ERRORS as error:
            unusable[error.reason] += 1
            continue
        # only now: a bad layout must not leave its image behind
        pixels.append(square)
        kept.append(question)
    if not kept:
        return None
    return _Batch(kept, torch.from_numpy(numpy.stack(pixels)),
                  torch.stack(given) if given else None)


def _layouts(model: TextToImage, column: str) -> Layouts | None:
    """Return what makes the layouts that the model was trained with; None for a model without."""
    config = model.seq2seq.config
    if config.layout_grid is None or config.layout_kind is None:
        return None
    if config.layout_kind == "colors":  # computed from the image itself; no column is read
        return Layouts(LayoutConfig(kind="colors", grid=config.layout_grid))
    return Layouts(LayoutConfig(kind="classes", grid=config.layout_grid,
                                classes=config.layout_classes, column=column))


def caption_loss_sums(model: TextToImage, pixels: Tensor, captions: list[str],
                      layouts: Tensor | None) -> Tensor:
    """Sum the loss over a batch of pixels [B, S, S, 3]: [2, N] float64, in nats.

    Row 0 is given the captions, row 1 the null caption.
    """
    codes = model.image_tokenizer.encode(pixels_to_float(pixels).to(model.device))
    image_tokens = codes_to_tokens(codes)  # [B, N]
    text = model.text_tokenizer.encode(captions)
    null_text = TextBatch(*_repeated(model.text_tokenizer.null_for(text), len(captions)))
    given_caption = token_losses(model.seq2seq, text, image_tokens, layouts)  # [B, N]
    given_null = token_losses(model.seq2seq, null_text, image_tokens, layouts)
    return torch.stack([given_caption.sum(dim=0), given_null.sum(dim=0)])


def _repeated(text: TextBatch, count: int) -> Iterator[Tensor]:
    """One row of each part of a text batch, seen as `count` rows."""
    for part in text:
        yield part.expand(count, *part.shape[1:])  # a view: no copies of the same row
