"""Continuous batching: a queue of captions whose pictures share one batch, each with parameters and a seed of its own.

    scheduler = Scheduler(decoder, rows=16)
    for picture in scheduler.run(PictureJob(captions, unguided, params, seeds=[0, 1, 2, 3]) for ...):
        ...  # FinishedPicture or FailedPicture, in the order in which they end

A picture takes one row of the batch, and a second one while guidance acts on it. A step of the decoder moves all pictures on
by one token, wherever each of them is; a row that becomes free is given to the queue's next picture at the step after. A
picture's tokens are those of `inference.generation.ways`, whatever shares its batch and whenever it began.

One thread at a time may call a Scheduler.
"""

# Axes: R rows (of them A active: rows 0 .. A - 1), b pictures drawn at once, n pictures of a job, N image tokens, L layout
#       tokens, K codebook size, T text slots

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.drawing import _drawn, _scales
from inference.generation.picture_job import FailedPicture, FinishedPicture, PictureJob, check_job
from inference.generation.row_buffers import RowBuffers
from inference.sampling import SamplingParams, guided_steps, noise_keys
from seq2seq import TextBatch
from tokenloom_common.errors import UserError, one_line

KEPT_UNGUIDED = 4  # texts of the second branch, the null caption or negative prompts, whose memory is kept for later jobs
FAILURES = (RuntimeError, ValueError, IndexError, TypeError)
"""What beginning a job may raise (torch's out of memory is a RuntimeError); it ends that job alone."""


@dataclass
class _Job:
    """A submitted job; `begun` of its pictures have left the queue."""

    ticket: int
    given: PictureJob
    guided: int  # image tokens that need the second branch
    branches: int  # rows that a picture takes at first
    memory: CaptionMemory | None = None  # from its first picture's admission to its last one's
    begun: int = 0


@dataclass
class _Row:
    """Where a row is, and how many slots of text it attends to across."""

    at: int
    text: int


@dataclass
class _Picture:
    """A picture being drawn: its row, under guidance the second branch's too, and the number of the token to draw next."""

    job: _Job
    index: int
    rows: list[_Row]
    position: int
    layout: Tensor | None  # [L]


@dataclass(frozen=True)
class _Batch:
    """Pictures of equal parameters, drawn by one call: their rows [b], their second branches' rows [b], guidance [N]."""

    params: SamplingParams
    rows: Tensor
    others: Tensor | None
    scales: Tensor


class Scheduler:
    """Draws the pictures of all submitted jobs, first come first served, in `rows` rows. UserError for rows below 1.

    `forwards` counts the decoder's steps. What a row needs is allocated here, once; beside it live the memory of the caption
    whose pictures are being admitted and of up to KEPT_UNGUIDED unguided texts.
    """

    def __init__(self, decoder: CachedDecoder, rows: int) -> None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise UserError(f"rows must be a whole number of at least 1, got {rows!r}")
        self.decoder, self.rows = decoder, rows
        self.total = decoder.config.num_tokens
        self.forwards = 0
        self._buffers = RowBuffers.of(decoder, rows)
        self._rows: list[_Row] = []  # the active ones: row r is at place r
        self._pictures: list[_Picture] = []  # in the order of their admission
        self._queue: deque[_Job] = deque()
        self._ended: deque[FinishedPicture | FailedPicture] = deque()  # not handed out yet
        self._tickets = count()
        self._unguided: list[tuple[TextBatch, CaptionMemory]] = []  # the last one was used last
        self._plan: list[_Batch] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.tensors())

    @property
    def active_rows(self) -> int:
        """A."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Pictures that have not begun."""
        return sum(len(job.given.seeds) - job.begun for job in self._queue)

    @property
    def drawing(self) -> int:
        """Pictures that have begun."""
        return len(self._pictures)

    def submit(self, job: PictureJob) -> int:
        """Queue a job -> its ticket. UserError for what can never be drawn."""
        check_job(job, self.decoder.config)
        params, layouts = job.params, self.decoder.config.layout_tokens
        guided = guided_steps(params, self.total)
        branches = 2 if guided or (layouts and job.layout is None and guided_steps(params, layouts)) else 1
        if branches > self.rows:
            raise UserError(f"a picture under guidance (guidance_scale {params.guidance_scale:g}) needs 2 rows, and there is "
                            f"{self.rows}; give more rows, or turn guidance off (guidance_scale 1)")
        ticket = next(self._tickets)
        self._queue.append(_Job(ticket, job, guided, branches))
        return ticket

    def cancel(self, ticket: int) -> int:
        """Drop what is left of a job, queued and in the batch; its rows are free at once, and nothing of it comes any more.
        -> pictures dropped; 0 for a ticket that is done or was never given."""
        before = self.waiting + self.drawing + len(self._ended)
        self._queue = deque(job for job in self._queue if job.ticket != ticket)
        self._ended = deque(picture for picture in self._ended if picture.ticket != ticket)
        dropped = [picture for picture in self._pictures if picture.job.ticket == ticket]
        self._pictures = [picture for picture in self._pictures if picture.job.ticket != ticket]
        self._release([row for picture in dropped for row in picture.rows])
        return before - self.waiting - self.drawing - len(self._ended)

    def run(self, jobs: Iterable[PictureJob] = ()) -> Iterator[FinishedPicture | FailedPicture]:
        """Step until nothing is left. `jobs` are submitted one by one as the queue gets short, so there may be any number of
        them; between two pictures others may be submitted and cancelled."""
        coming = iter(jobs)
        while True:
            while self.waiting < self.rows and (job := next(coming, None)) is not None:
                self.submit(job)
            if not (self._queue or self._pictures or self._ended):
                return
            self._advance()
            while self._ended:
                yield self._ended.popleft()

    def step(self) -> list[FinishedPicture | FailedPicture]:
        """Admit what fits, then one token for every picture in the batch -> the pictures that ended.

        When the decoder raises (out of memory), no picture has moved: the step may be repeated, or a job cancelled before."""
        self._advance()
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _advance(self) -> None:
        self._admit()
        if self._pictures:
            self._draw(self._logits())
            self._settle()

    def _admit(self) -> None:
        while self._queue:
            job = self._queue[0]  # nobody overtakes it
            left = len(job.given.seeds) - job.begun
            fitting = min((self.rows - self.active_rows) // job.branches, left)
            if fitting == 0:
                return
            try:
                self._begin(job, fitting)
            except FAILURES as error:
                reason = one_line(error)
                self._ended += [FailedPicture(job.ticket, job.given.name, job.begun + at, reason) for at in range(left)]
                job.begun += left
            if job.begun == len(job.given.seeds):
                self._queue.popleft()
                job.memory = None
            self._settle()  # a single token may be the whole picture, guidance may have acted on the layout alone

    def _begin(self, job: _Job, pictures: int) -> None:
        """Put the job's next pictures after the active rows, up to where a step of the decoder takes them on."""
        decoder, buffers, given, first = self.decoder, self._buffers, job.given, self.active_rows
        layouts, own = decoder.config.layout_tokens, slice(job.begun, job.begun + pictures)
        groups = [replace(memory, images=pictures) for memory in self._memories(job)]  # one a branch
        rows = slice(first, first + len(groups) * pictures)
        buffers.put_text(decoder, groups, first)
        keys = noise_keys(given.seeds[own], layouts + self.total).to(decoder.device)  # [n, L + N]
        layout = None
        if layouts:
            layout = None if given.layout is None else given.layout[own].to(decoder.device)
            layout = self._put_layout(given.params, layout, keys, groups, buffers.cache.rows(first, rows.stop - first))
        buffers.keys[first: first + pictures] = keys[:, layouts:]
        buffers.positions[rows] = decoder.first_position
        buffers.tokens[rows] = decoder.begin
        if decoder.first_position == 1:  # the text's last slot predicts token 0
            scale = _scales(given.params, self.total, decoder.device)[:1]
            drawn = _drawn(decoder.first_logits(groups), pictures, given.params, scale, keys[:, layouts])
            buffers.tokens[rows, 1] = drawn.repeat(len(groups))
        added = [_Row(first + at, groups[at // pictures].keys[0].shape[2]) for at in range(len(groups) * pictures)]
        self._rows += added
        self._pictures += [_Picture(job, job.begun + at, added[at::pictures], decoder.first_position,
                                    None if layout is None else layout[at]) for at in range(pictures)]
        job.begun, self._plan = own.stop, None

    def _memories(self, job: _Job) -> list[CaptionMemory]:
        """The text of each branch, worked through once: a job's caption while its pictures are queued, an unguided text for all
        jobs that share it."""
        if job.memory is None:
            job.memory = self.decoder.prefill(_on(job.given.captions, self.decoder.device), 1)
        if job.branches == 1:
            return [job.memory]
        text = _on(job.given.unguided, self.decoder.device)
        known = next((pair for pair in self._unguided if all(map(torch.equal, pair[0], text))), None)
        if known is None:
            known = text, self.decoder.prefill(text, 1)
        self._unguided = [*(pair for pair in self._unguided if pair is not known), known][-KEPT_UNGUIDED:]
        return [job.memory, known[1]]

    def _put_layout(self, params: SamplingParams, layout: Tensor | None, keys: Tensor, groups: list[CaptionMemory],
                    cache: SelfCache) -> Tensor:
        """The layout [n, L] into the cache of new rows: the given one at once, else token after token as they are drawn."""
        decoder, branches = self.decoder, len(groups)
        if layout is not None:
            decoder.decode_layout(layout.repeat(branches, 1), 0, groups, cache)
            return layout
        drawn: list[Tensor] = []
        none_yet = torch.empty(cache.row_count, 0, dtype=torch.int64, device=decoder.device)
        logits = decoder.decode_layout(none_yet, 0, groups, cache)
        for position, scale in enumerate(_scales(params, decoder.config.layout_tokens, decoder.device)):
            drawn.append(_drawn(logits, len(keys), params, scale, keys[:, position]))
            logits = decoder.decode_layout(drawn[-1].repeat(branches)[:, None], position, groups, cache)
        return torch.stack(drawn, dim=1)

    def _logits(self) -> Tensor:
        """One step of the decoder for the active rows -> logits [A, K] of each one's next token."""
        buffers, active = self._buffers, self.active_rows
        positions = buffers.positions[:active, None]  # [A, 1]
        groups = buffers.caption_memory(active, max(row.text for row in self._rows))
        logits = self.decoder.decode_at(buffers.tokens[:active].gather(1, positions), positions, groups,
                                        buffers.cache.rows(0, active), end=max(p.position for p in self._pictures) + 1)
        self.forwards += 1
        return logits[:, 0]

    def _draw(self, logits: Tensor) -> None:
        """The next token of every picture, from logits [A, K]."""
        buffers = self._buffers
        for batch in self._batches():
            at = buffers.positions[batch.rows]  # [b]
            rows = batch.rows if batch.others is None else torch.cat([batch.rows, batch.others])
            drawn = _drawn(logits[rows], len(at), batch.params, batch.scales[at], buffers.keys[batch.rows, at])
            buffers.tokens[rows, (at + 1).repeat(len(rows) // len(at))] = drawn.repeat(len(rows) // len(at))
        buffers.positions[: self.active_rows] += 1
        for picture in self._pictures:
            picture.position += 1

    def _batches(self) -> list[_Batch]:
        """How the rows are drawn; worked out again when a row begins, ends or moves."""
        if self._plan is None:
            alike: dict[tuple[SamplingParams, int], list[_Picture]] = {}
            for picture in self._pictures:
                alike.setdefault((picture.job.given.params, len(picture.rows)), []).append(picture)
            self._plan = []
            for (params, branches), pictures in alike.items():
                places = torch.tensor([[row.at for row in picture.rows] for picture in pictures], device=self.decoder.device)
                self._plan.append(_Batch(params, places[:, 0], places[:, 1] if branches == 2 else None,
                                         _scales(params, self.total, self.decoder.device)))
        return self._plan

    def _settle(self) -> None:
        """Take out the pictures that are complete, and the second branches that guidance no longer needs."""
        done = [picture for picture in self._pictures if picture.position == self.total]
        self._ended += [
            FinishedPicture(p.job.ticket, p.job.given.name, p.index, self._buffers.tokens[p.rows[0].at, 1:].clone(), p.layout)
            for p in done]
        self._pictures = [picture for picture in self._pictures if picture.position < self.total]
        free = [row for picture in done for row in picture.rows]
        for picture in self._pictures:
            if len(picture.rows) == 2 and picture.position >= picture.job.guided:
                free.append(picture.rows.pop())
        self._release(free)

    def _release(self, free: list[_Row]) -> None:
        """Rows are free: the last active row moves into the place of each, from the last one to the first, so that it stays."""
        for row in sorted(free, key=lambda row: row.at, reverse=True):
            last = self._rows.pop()
            if last is not row:
                self._buffers.move_row(last.at, row.at)
                self._rows[row.at] = last
                last.at = row.at
        if free:
            self._plan = None


def _on(text: TextBatch, device: torch.device) -> TextBatch:
    return TextBatch(*(part.to(device) for part in text))


