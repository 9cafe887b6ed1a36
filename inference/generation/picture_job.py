"""What a Scheduler takes and gives: one caption's pictures, and each of them when it ends."""

# Axes: n pictures of a job, N image tokens, L layout tokens, T text slots

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.sampling import SamplingParams
from seq2seq import TextBatch, TransformerConfig
from tokenloom_common.errors import UserError


@dataclass(frozen=True)
class PictureJob:
    """One caption's pictures. captions: one caption [1, T]; unguided: the text [1, T] that guidance leads away from; seeds: one
    a picture; layout [n, L] is given, or None: sampled, where the model has one; name: what the caller likes, given back."""

    captions: TextBatch
    unguided: TextBatch
    params: SamplingParams
    seeds: list[int]
    layout: Tensor | None = None
    name: Any = None


@dataclass(frozen=True)
class FinishedPicture:
    """Picture `index` of a job: image_tokens [N] int64, layout [L] int64 of models that have one."""

    ticket: int
    name: Any
    index: int
    image_tokens: Tensor
    layout: Tensor | None


@dataclass(frozen=True)
class FailedPicture:
    """Picture `index` of a job was not drawn: the reason in one line."""

    ticket: int
    name: Any
    index: int
    reason: str


def check_job(job: PictureJob, config: TransformerConfig) -> None:
    """UserError for a job that the model cannot draw, before anything slow."""
    for what, text in (("captions", job.captions), ("unguided", job.unguided)):
        if any(tuple(part.shape[:2]) != (1, config.text_length) for part in text):
            raise UserError(f"{what}: a job has one caption of {config.text_length} slots, got a mask of "
                            f"{tuple(text.text_mask.shape)} and text of {tuple(text.text_input.shape)}")
    if not job.seeds:
        raise UserError("a job without seeds draws nothing; give one seed a picture")
    wrong = [seed for seed in job.seeds if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63]
    if wrong:
        raise UserError(f"a seed must be a whole number from 0 to {(1 << 63) - 1}, got {wrong[0]!r}")
    if job.layout is None:
        return
    if not config.layout_tokens:
        raise UserError("this model was trained without layouts; leave the layout out")
    if tuple(job.layout.shape) != (len(job.seeds), config.layout_tokens):
        raise UserError(f"a layout of {tuple(job.layout.shape)} numbers for {len(job.seeds)} pictures: this model reads "
                        f"{config.layout_tokens} a picture")
    if int(job.layout.min()) < 0 or int(job.layout.max()) >= (config.layout_classes or 0):
        raise UserError(f"a layout's numbers must lie in 0 to {(config.layout_classes or 0) - 1}, found "
                        f"{int(job.layout.min())} to {int(job.layout.max())}")
