"""Jobs of continuous batching: what a Scheduler takes and returns, and its own record of what is
queued and drawn."""

# Axes: n images of a job, b images drawn by one call, N image tokens, L layout tokens, T text slots

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.decoder.kv_cache import CaptionMemory
from inference.generation.drawing import guidance_scales
from inference.sampling import SamplingParams
from seq2seq import TextBatch, TransformerConfig
from tokenloom_common.errors import UserError

MAX_SEED = (1 << 63) - 1  # noise keys are int64


@dataclass(frozen=True)
class ImageJob:
    """The n images of one caption [1, T], one seed each.

    unconditional [1, T]: text of the second branch of classifier-free guidance. layout [n, L]: None
    to sample it, where the model has one. name: anything; it is handed back with each image.
    """

    captions: TextBatch
    unconditional: TextBatch
    params: SamplingParams
    seeds: list[int]
    layout: Tensor | None = None
    name: Any = None


@dataclass(frozen=True)
class FinishedImage:
    """Image `index` of a job: image_tokens [N] int64, and layout [L] int64 if the model has one."""

    ticket: int
    name: Any
    index: int
    image_tokens: Tensor
    layout: Tensor | None


@dataclass(frozen=True)
class FailedImage:
    """Image `index` of a job that could not be drawn, with the reason in one line."""

    ticket: int
    name: Any
    index: int
    reason: str


EndedImage = FinishedImage | FailedImage


def check_job(job: ImageJob, config: TransformerConfig) -> None:
    """Raise UserError for a job that the model cannot draw, before anything slow."""
    for name, text in (("captions", job.captions), ("unconditional", job.unconditional)):
        one_caption = (1, config.text_length)
        if text.text_input.shape[:2] != one_caption or text.text_mask.shape[:2] != one_caption:
            raise UserError(
                f"{name}: a job has one caption of {config.text_length} slots, got a mask of "
                f"{tuple(text.text_mask.shape)} and text of {tuple(text.text_input.shape)}")
    if not job.seeds:
        raise UserError("a job without seeds draws nothing; give one seed per image")
    for seed in job.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            raise UserError(f"a seed must be a whole number from 0 to {MAX_SEED}, got {seed!r}")
    if job.layout is not None:
        _check_layout(job.layout, len(job.seeds), config)


def _check_layout(layout: Tensor, images: int, config: TransformerConfig) -> None:
    if not config.layout_tokens:
        raise UserError("this model was trained without layouts; leave the layout out")
    if tuple(layout.shape) != (images, config.layout_tokens):
        raise UserError(f"a layout of {tuple(layout.shape)} numbers for {images} images: "
                        f"this model reads {config.layout_tokens} per image")
    lowest, highest = int(layout.min()), int(layout.max())
    limit = (config.layout_classes or 0) - 1
    if lowest < 0 or highest > limit:
        raise UserError(f"a layout's numbers must lie in 0 to {limit}, found {lowest} to {highest}")


# ---- the scheduler's own record of a job


@dataclass
class QueuedJob:
    """A submitted job, queued until the last of its images is admitted to the batch."""

    ticket: int
    job: ImageJob
    guided_steps: int  # image tokens that need the unconditional branch
    branches: int  # rows that an image takes at first
    memory: CaptionMemory | None = None  # the caption's; kept while the job is queued
    admitted: int = 0  # images that have left the queue

    @property
    def waiting(self) -> int:
        """Images still in the queue."""
        return len(self.job.seeds) - self.admitted


@dataclass
class Row:
    """A row of the batch: its index, which changes when rows are freed, and the text slots that
    it cross-attends to."""

    index: int
    text_slots: int


@dataclass
class ActiveImage:
    """An image being drawn: its row, under guidance the unconditional branch's too, and the
    position of its next token."""

    job: QueuedJob
    index: int
    rows: list[Row]
    position: int
    layout: Tensor | None  # [L]


@dataclass(frozen=True)
class DrawCall:
    """Images with equal parameters and as many branches: one call draws the next token of all."""

    params: SamplingParams
    rows: Tensor  # [b], the conditional branch
    unconditional_rows: Tensor | None  # [b]
    scales: Tensor  # [N], the guidance scale at each position


def draw_calls(images: list[ActiveImage], total: int, device: torch.device) -> list[DrawCall]:
    """Group the images of a batch by what one call can draw together; `total` is N."""
    groups: dict[tuple[SamplingParams, int], list[ActiveImage]] = {}
    for image in images:
        key = image.job.job.params, len(image.rows)
        groups.setdefault(key, []).append(image)

    calls = []
    for (params, branches), members in groups.items():
        indices = [[row.index for row in image.rows] for image in members]
        rows = torch.tensor(indices, device=device)  # [b, branches]
        unconditional_rows = rows[:, 1] if branches == 2 else None
        scales = guidance_scales(params, total, device)
        calls.append(DrawCall(params, rows[:, 0], unconditional_rows, scales))
    return calls
