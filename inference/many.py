"""Many prompts, each with parameters and a seed of its own, in one batch that never waits for its slowest picture."""

# Axes: N image tokens, n pictures of a request

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """A model whose requests share a batch; `TextToImage` is one."""

    decoder: CachedDecoder

    def image_job(self, request: PromptRequest, name: object) -> ImageJob:
        """The request as the scheduler takes it."""
        ...

    def decode_tokens(self, image_tokens: Tensor) -> list[Image.Image]:
        """Image tokens [B, N] -> B images."""
        ...


def generate_many(model: BatchModel, requests: Iterable[PromptRequest], batch_size: int) -> Iterator[ManyResult]:
    """Pictures of all requests in the order in which they end, in `batch_size` rows at a time (a guided picture takes two).

    Requests are read as there is room, so there may be any number. UserError for a request that is wrong, when it is read.
    """
    scheduler = Scheduler(model.decoder, batch_size)
    asked: dict[int, tuple[PromptRequest, SamplingParams]] = {}

    def jobs() -> Iterator[ImageJob]:
        for number, request in enumerate(requests):
            try:
                job = model.image_job(request, number)
            except UserError as error:
                raise UserError(f"request {number + 1}: {error}") from None
            asked[number] = request, job.params
            yield job

    left: dict[int, int] = {}
    for picture in scheduler.run(jobs()):
        number = picture.name
        request, params = asked[number]
        common = (number, picture.index, request.prompt, request.seed + picture.index, params, request.negative_prompt)
        if isinstance(picture, FailedImage):
            yield ManyResult(*common, reason=picture.reason)
        else:
            tokens = picture.image_tokens.cpu()
            yield ManyResult(*common, model.decode_tokens(tokens[None])[0], tokens,
                             None if picture.layout is None else picture.layout.cpu())
        left[number] = left.get(number, request.num_images) - 1
        if not left[number]:
            del asked[number], left[number]
