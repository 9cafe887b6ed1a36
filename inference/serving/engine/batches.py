"""A loaded model with its batch: jobs go in, their events come out, one decoder step at a time."""

# Axes: N image tokens, n images of a job

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.generation.drawing import count_branches
from inference.generation.image_job import FailedImage, FinishedImage
from inference.generation.scheduler import Scheduler
from inference.pipeline import TextToImage
from inference.requests import PromptRequest
from inference.serving.engine.jobs import EngineRequest, Failed, Finished, Job, Partial, Started
from inference.serving.engine.kept_images import KeptImage
from tokenloom_common.errors import one_line

log = logging.getLogger(__name__)


@dataclass
class DrawnJob:
    """A job in the batch, and how many partial images each image has had."""

    job: Job
    partials: dict[int, int]


class ModelBatch:
    """A model, its scheduler and the jobs in it. Used by one thread."""

    def __init__(self, name: str, model: TextToImage, rows: int, keep: Callable[[KeptImage], str],
                 clock: Callable[[], float]) -> None:
        """keep: stores a finished image, and returns its id."""
        self.name = name
        self.model = model
        self.scheduler = Scheduler(model.decoder, rows)
        self.total = self.scheduler.total
        self.loaded_at = self.used_at = clock()
        self._keep = keep
        self._clock = clock
        self._drawn: dict[int, DrawnJob] = {}  # by ticket

    @property
    def idle(self) -> bool:
        """Whether no job is in the batch."""
        return not self._drawn

    def warm_up(self) -> None:
        """Draw two tokens and decode an image that nobody sees.

        So that the first request does not pay for compiling kernels and choosing the thread count.
        """
        any_prompt = PromptRequest("0")  # a class too, of models of classes
        ticket = self.scheduler.submit(self.model.image_job(any_prompt))
        for _ in range(2):
            self.scheduler.step()
        self.scheduler.cancel(ticket)
        self.model.decode_tokens(torch.zeros(1, self.total, dtype=torch.int64))

    def has_room(self, request: EngineRequest) -> bool:
        """Whether an image of this request can be drawn from the next step on."""
        asked = request.request
        params = asked.params or self.model.default_params
        config = self.model.seq2seq.config
        branches = count_branches(params, config, asked.layout is not None)
        return self.scheduler.free_rows >= branches

    def admit(self, job: Job) -> None:
        """Put a job into the batch. UserError or RuntimeError if it cannot be encoded."""
        request = job.request.request
        image_job = self.model.image_job(request)
        ticket = self.scheduler.submit(image_job)
        self._drawn[ticket] = DrawnJob(job, dict.fromkeys(range(request.num_images), 0))
        self.used_at = self._clock()
        text_tokens = int(image_job.captions.text_mask.sum())
        job.publish(Started(image_job.params, text_tokens))

    def drop(self, job: Job) -> None:
        """Take a job out of the batch, and free its rows."""
        for ticket, drawn in list(self._drawn.items()):
            if drawn.job is job:
                self.scheduler.cancel(ticket)
                del self._drawn[ticket]

    def step(self) -> int:
        """Draw one token of every image, and publish what is complete; returns the tokens drawn.

        If the decoder fails, the newest job fails with it, and the others go on.
        """
        try:
            ended = self.scheduler.step()
        except Exception as error:
            log.exception("model %s: a decoder step failed", self.name)
            newest = self._drawn[max(self._drawn)].job
            self.drop(newest)
            newest.fail(one_line(error), "error")
            return 0

        tokens = len(ended) + self.scheduler.drawing
        for image in ended:
            self._publish_ended(image)
        self._publish_partials()
        return tokens

    # ---- events

    def _publish_ended(self, image: FinishedImage | FailedImage) -> None:
        """Publish the last event of an image."""
        drawn = self._drawn[image.ticket]
        event: Finished | Failed
        if isinstance(image, FailedImage):
            event = Failed(image.index, image.reason)
        else:
            try:
                event = self._finished(drawn, image)
            except Exception as error:
                log.exception("model %s: an image could not be decoded", self.name)
                event = Failed(image.index, one_line(error))
        drawn.job.publish(event)
        if drawn.job.done:
            del self._drawn[image.ticket]

    def _finished(self, drawn: DrawnJob, image: FinishedImage) -> Finished:
        """Decode and keep an image."""
        request = drawn.job.request.request
        tokens = image.image_tokens.cpu()
        layout = None if image.layout is None else image.layout.cpu()
        [pixels] = self.model.decode_tokens(tokens[None])
        image_id = self._keep(KeptImage(self.name, request.prompt, tokens, layout))
        return Finished(image.index, pixels, request.seed + image.index, tokens, image_id, layout)

    def _publish_partials(self) -> None:
        for ticket, drawn in self._drawn.items():
            wanted = drawn.job.request.partial_images
            if not wanted:
                continue
            for index, tokens in self.scheduler.drawn_so_far(ticket).items():
                shown = drawn.partials[index]
                if shown < wanted and len(tokens) >= partial_at(shown, wanted, self.total):
                    drawn.partials[index] += 1
                    self._publish_partial(drawn, index, tokens, shown)

    def _publish_partial(self, drawn: DrawnJob, index: int, tokens: Tensor, shown: int) -> None:
        try:
            [pixels] = self.model.pixels.decode_partial(tokens[None])
        except Exception:  # the image itself may still come
            log.exception("model %s: a partial image could not be decoded", self.name)
            return
        drawn.job.publish(Partial(index, pixels, shown, len(tokens)))


def partial_at(number: int, wanted: int, total: int) -> int:
    """Return the tokens, of `total`, after which partial image `number` of `wanted` is due."""
    return math.ceil(total * (number + 1) / (wanted + 1))
