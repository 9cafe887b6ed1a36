"""Many prompts, each with its own parameters and seed, in one shared batch."""

# Axes: N image tokens, n images of a request

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from PIL import Image
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.image_job import FailedImage, ImageJob
from inference.generation.scheduler import Scheduler
from inference.requests import PromptRequest
from inference.results import ManyResult
from inference.sampling import SamplingParams
from tokenloom_common.errors import UserError


class BatchModel(Protocol):
    """A model that can draw many requests in one batch; `TextToImage` is one."""

    decoder: CachedDecoder

    def image_job(self, request: PromptRequest, name: object) -> ImageJob:
        """Encode the request for the scheduler. UserError for a wrong one."""
        ...

    def decode_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """Decode image tokens [B, N] to B images."""
        ...


def generate_many(model: BatchModel, requests: Iterable[PromptRequest],
                  batch_size: int) -> Iterator[ManyResult]:
    """Yield the images of all requests in the order in which they end, drawn in `batch_size` rows.

    An image takes one row, or two under guidance. Requests are read as there is room, so there may
    be any number of them. UserError for a wrong request, when it is read.
    """
    scheduler = Scheduler(model.decoder, batch_size)
    # requests with images that have not ended; the parameters as used, defaults included
    open_requests: dict[int, tuple[PromptRequest, SamplingParams]] = {}
    images_left: dict[int, int] = {}

    def jobs() -> Iterator[ImageJob]:
        for number, request in enumerate(requests):
            try:
                job = model.image_job(request, number)
            except UserError as error:
                raise UserError(f"request {number + 1}: {error}") from None
            open_requests[number] = request, job.params
            images_left[number] = request.num_images
            yield job

    for image in scheduler.run(jobs()):
        number = image.name
        request, params = open_requests[number]
        result = ManyResult(number, image.index, request.prompt, request.seed + image.index, params,
                            request.negative_prompt)
        if isinstance(image, FailedImage):
            yield replace(result, reason=image.reason)
        else:
            tokens = image.image_tokens.cpu()
            layout = None if image.layout is None else image.layout.cpu()
            [pixels] = model.decode_tokens(tokens[None])
            yield replace(result, image=pixels, image_tokens=tokens, layout=layout)
        images_left[number] -= 1
        if not images_left[number]:
            del open_requests[number], images_left[number]
