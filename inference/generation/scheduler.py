"""Continuous batching: a queue of captions whose images share one batch, each with its own
parameters and seed.

    scheduler = Scheduler(decoder, rows=16)
    for image in scheduler.run(ImageJob(captions, unconditional, params, seeds=[0, 1]) for ...):
        ...  # FinishedImage or FailedImage, in the order in which they end

An image takes one row of the batch, and a second one while guidance acts on it. A decoder step
advances all images by one token, wherever each of them is; a row that becomes free goes to the next
image in the queue at the following step. An image's tokens are those of
`inference.generation.ways`, whatever shares its batch and whenever it started.

Not thread-safe: one thread at a time may call a Scheduler.
"""

# Axes: R rows (of them A active: rows 0 .. A - 1), b images drawn by one call, n images of a job, N
#       image tokens, L layout tokens, K codebook size

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.drawing import count_branches, draw_tokens, guidance_scales, put_layout
from inference.generation.image_job import (
    ActiveImage,
    DrawCall,
    EndedImage,
    FailedImage,
    FinishedImage,
    ImageJob,
    QueuedJob,
    Row,
    check_job,
    draw_calls,
)
from inference.generation.row_buffers import JobTexts, RowBuffers
from inference.sampling import guided_steps, noise_keys
from tokenloom_common.errors import UserError, one_line

FAILURES = (RuntimeError, ValueError, IndexError, TypeError)
"""Errors of admission that end the job alone (torch's out of memory is a RuntimeError)."""


class Scheduler:
    """Draw the images of all submitted jobs, first come first served, in `rows` rows.

    `forwards` counts the decoder's steps. The rows' buffers are allocated once, here; beside them
    live the memory of the caption whose images are being admitted, and of the last KEPT_CAPTIONS
    captions and KEPT_UNCONDITIONAL unconditional texts. UserError for rows below 1.
    """

    def __init__(self, decoder: CachedDecoder, rows: int) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise UserError(f"rows must be a whole number of at least 1, got {rows!r}")
        self.decoder = decoder
        self.rows = rows
        self.total = decoder.config.num_tokens
        self.forwards = 0
        self._buffers = RowBuffers.allocate(decoder, rows)
        self._rows: list[Row] = []  # active rows: self._rows[i].index == i
        self._images: list[ActiveImage] = []  # in the order of their admission
        self._queue: deque[QueuedJob] = deque()
        self._ended: deque[EndedImage] = deque()  # not handed out yet
        self._tickets = count()
        self._texts = JobTexts(decoder)
        self._draw_calls: list[DrawCall] | None = None  # None when rows have changed

    @property
    def active_rows(self) -> int:
        """A, the rows that hold an image or its unconditional branch."""
        return len(self._rows)

    @property
    def free_rows(self) -> int:
        """Rows that neither an image of the batch nor one in the queue needs; may be negative."""
        queued = [job.waiting * job.branches for job in self._queue]
        return self.rows - self.active_rows - sum(queued)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(queued.waiting for queued in self._queue)

    @property
    def drawing(self) -> int:
        """Images in the batch."""
        return len(self._images)

    # ---- the queue

    def submit(self, job: ImageJob) -> int:
        """Queue a job and return its ticket. UserError for a job that can never be drawn."""
        config = self.decoder.config
        check_job(job, config)
        branches = count_branches(job.params, config, job.layout is not None)
        if branches > self.rows:
            scale = job.params.guidance_scale
            raise UserError(
                f"an image under guidance (guidance_scale {scale:g}) needs 2 rows, and there is "
                f"{self.rows}; give more rows, or turn guidance off (guidance_scale 1)")
        ticket = next(self._tickets)
        self._queue.append(QueuedJob(ticket, job, guided_steps(job.params, self.total), branches))
        return ticket

    def cancel(self, ticket: int) -> int:
        """Drop all images of a job that were not handed out yet, and free their rows at once.

        Returns the number of images dropped; 0 for a ticket that is done or was never given.
        """
        before = self.waiting + self.drawing + len(self._ended)
        self._queue = deque(queued for queued in self._queue if queued.ticket != ticket)
        self._ended = deque(image for image in self._ended if image.ticket != ticket)
        dropped = [image for image in self._images if image.job.ticket == ticket]
        self._images = [image for image in self._images if image.job.ticket != ticket]
        self._free([row for image in dropped for row in image.rows])
        return before - self.waiting - self.drawing - len(self._ended)

    def drawn_so_far(self, ticket: int) -> dict[int, Tensor]:
        """Return the tokens of a job's images in the batch, [n] int64 with n < N, by index."""
        drawn = {}
        for image in self._images:
            if image.job.ticket == ticket:
                tokens = self._buffers.tokens[image.rows[0].index, 1: image.position + 1]
                drawn[image.index] = tokens.clone()  # since the row may move
        return drawn

    def run(self, jobs: Iterable[ImageJob] = ()) -> Iterator[EndedImage]:
        """Step until nothing is left, yielding images as they end.

        `jobs` are submitted one by one as the queue runs short, so there may be any number of them.
        Between two images, others may be submitted and cancelled.
        """
        remaining = iter(jobs)
        while True:
            while self.waiting < self.rows and (job := next(remaining, None)) is not None:
                self.submit(job)
            if not (self._queue or self._images or self._ended):
                return
            self._advance()
            while self._ended:
                yield self._ended.popleft()

    def step(self) -> list[EndedImage]:
        """Admit what fits, draw one token of every image in the batch; return those that ended.

        If the decoder raises (out of memory), no image has moved: the step may be repeated, or a
        job cancelled first.
        """
        self._advance()
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _advance(self) -> None:
        self._admit()
        if self._images:
            self._draw(self._logits())
            self._remove_finished()

    # ---- admission

    def _admit(self) -> None:
        while self._queue:
            queued = self._queue[0]  # no job overtakes it, even one that would fit
            fitting = min((self.rows - self.active_rows) // queued.branches, queued.waiting)
            if fitting == 0:
                return
            try:
                self._start(queued, fitting)
            except FAILURES as error:
                self._fail(queued, one_line(error))
            if queued.waiting == 0:
                self._queue.popleft()
                queued.memory = None
            # an image of one token may be complete, and guidance may have acted on the layout alone
            self._remove_finished()

    def _fail(self, queued: QueuedJob, reason: str) -> None:
        """End the images of a job that are still queued."""
        for index in range(queued.admitted, len(queued.job.seeds)):
            self._ended.append(FailedImage(queued.ticket, queued.job.name, index, reason))
        queued.admitted = len(queued.job.seeds)

    def _start(self, queued: QueuedJob, images: int) -> None:
        """Put the job's next images after the active rows, ready for the next decoder step."""
        decoder, buffers, job = self.decoder, self._buffers, queued.job
        layout_tokens = decoder.config.layout_tokens
        if queued.memory is None:
            queued.memory = self._texts.captions.get(job.captions)
        memories = [queued.memory]
        if queued.branches == 2:
            memories.append(self._texts.unconditional.get(job.unconditional))
        groups = [replace(memory, images=images) for memory in memories]
        branches = len(groups)
        first, end = self.active_rows, self.active_rows + branches * images
        own = slice(queued.admitted, queued.admitted + images)

        buffers.put_text(decoder, groups, first)
        keys = noise_keys(job.seeds[own], layout_tokens + self.total)  # [n, L + N]
        keys = keys.to(decoder.device)
        layout = None if job.layout is None else job.layout[own].to(decoder.device)
        if layout_tokens:
            cache = buffers.cache.rows(first, end - first)
            layout = put_layout(decoder, groups, cache, layout, job.params, keys)

        buffers.keys[first: first + images] = keys[:, layout_tokens:]
        buffers.positions[first:end] = decoder.first_position
        buffers.tokens[first:end] = decoder.begin
        if decoder.first_position == 1:  # the text's last slot predicts token 0
            scale = guidance_scales(job.params, self.total, decoder.device)[:1, None]
            logits = decoder.first_logits(groups)
            ids = draw_tokens(logits, scale, job.params, keys[:, layout_tokens])
            buffers.tokens[first:end, 1] = ids.repeat(branches)

        # only now that nothing can fail any more
        rows: list[Row] = []
        for group in groups:
            text_slots = group.keys[0].shape[2]
            rows += [Row(first + len(rows) + at, text_slots) for at in range(images)]
        self._rows += rows
        for at in range(images):
            self._images.append(ActiveImage(
                queued, queued.admitted + at, rows[at::images], decoder.first_position,
                None if layout is None else layout[at]))
        queued.admitted = own.stop
        self._draw_calls = None

    # ---- one step

    def _logits(self) -> Tensor:
        """Run one decoder step on the active rows -> logits [A, K] of each row's next token."""
        buffers, active = self._buffers, self.active_rows
        positions = buffers.positions[:active, None]  # [A, 1]
        previous = buffers.tokens[:active].gather(1, positions)
        groups = buffers.caption_memory(active, max(row.text_slots for row in self._rows))
        cache = buffers.cache.rows(0, active)
        end = max(image.position for image in self._images) + 1  # later slots are not looked at
        logits = self.decoder.decode_at(previous, positions, groups, cache, end=end)
        self.forwards += 1
        return logits[:, 0]

    def _draw(self, logits: Tensor) -> None:
        """Draw the next token of every image, from logits [A, K]."""
        buffers = self._buffers
        if self._draw_calls is None:
            self._draw_calls = draw_calls(self._images, self.total, self.decoder.device)
        for call in self._draw_calls:
            rows = call.rows
            positions = buffers.positions[call.rows]  # [b]
            scale = call.scales[positions][:, None]
            keys = buffers.keys[call.rows, positions]
            if call.unconditional_rows is not None:
                rows = torch.cat([call.rows, call.unconditional_rows])  # [2b]
            ids = draw_tokens(logits[rows], scale, call.params, keys)

            branches = len(rows) // len(ids)
            buffers.tokens[rows, (positions + 1).repeat(branches)] = ids.repeat(branches)
        buffers.positions[: self.active_rows] += 1
        for image in self._images:
            image.position += 1

    def _remove_finished(self) -> None:
        """Take out complete images, and unconditional branches that guidance no longer needs."""
        free: list[Row] = []
        active: list[ActiveImage] = []
        for image in self._images:
            if image.position == self.total:
                queued = image.job
                # a copy, since the row is given to the next image
                tokens = self._buffers.tokens[image.rows[0].index, 1:].clone()
                self._ended.append(FinishedImage(
                    queued.ticket, queued.job.name, image.index, tokens, image.layout))
                free += image.rows
                continue
            if len(image.rows) == 2 and image.position >= image.job.guided_steps:
                free.append(image.rows.pop())
            active.append(image)
        self._images = active
        self._free(free)

    def _free(self, free: list[Row]) -> None:
        """Free rows by swapping in the last active row; go backwards so that indices stay valid."""
        for row in sorted(free, key=lambda row: row.index, reverse=True):
            last = self._rows.pop()
            if last is not row:
                self._buffers.move_row(last.index, row.index)
                self._rows[row.index] = last
                last.index = row.index
        if free:
            self._draw_calls = None
