"""Many prompts, each with parameters and a seed of its own, in one batch that never waits for its slowest picture."""

# Axes: N image tokens, n pictures of a request

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from inference.picture_job import FailedPicture, PictureJob
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from tokenloom_common.errors import UserError, nearest_name, one_line

if TYPE_CHECKING:
    from inference.pipeline import TextToImage

REQUEST_FIELDS = ("prompt", "num_images", "seed", "negative_prompt", "layout")
"""Of a line of a prompts file, beside the fields of SamplingParams."""


@dataclass(frozen=True)
class PromptRequest:
    """Pictures of one prompt: picture i is drawn with seed + i. params: the model folder's when None."""

    prompt: str
    num_images: int = 1
    seed: int = 0
    params: SamplingParams | None = None
    negative_prompt: str | None = None
    layout: Any = None


@dataclass(frozen=True)
class ManyResult:
    """One picture of request number `request`: image_tokens [N] int64 on the CPU, or in one line the reason for none."""

    request: int
    index: int
    prompt: str
    seed: int
    params: SamplingParams
    negative_prompt: str | None = None
    image: Image.Image | None = None
    image_tokens: Tensor | None = None
    layout: Tensor | None = None
    reason: str | None = None


def generate_many(model: TextToImage, requests: Iterable[PromptRequest], batch_size: int) -> Iterator[ManyResult]:
    """Pictures of all requests in the order in which they end, in `batch_size` rows at a time (a guided picture takes two).

    Requests are read as there is room, so there may be any number. UserError for a request that is wrong, when it is read.
    """
    scheduler = Scheduler(model.decoder, batch_size)
    asked: dict[int, tuple[PromptRequest, SamplingParams]] = {}

    def jobs() -> Iterator[PictureJob]:
        for number, request in enumerate(requests):
            try:
                job = model.picture_job(request, number)
            except UserError as error:
                raise UserError(f"request {number + 1}: {error}") from None
            asked[number] = request, job.params
            yield job

    left: dict[int, int] = {}
    for picture in scheduler.run(jobs()):
        number = picture.name
        request, params = asked[number]
        common = (number, picture.index, request.prompt, request.seed + picture.index, params, request.negative_prompt)
        if isinstance(picture, FailedPicture):
            yield ManyResult(*common, reason=picture.reason)
        else:
            tokens = picture.image_tokens.cpu()
            yield ManyResult(*common, model.decode_tokens(tokens[None])[0], tokens,
                             None if picture.layout is None else picture.layout.cpu())
        left[number] = left.get(number, request.num_images) - 1
        if not left[number]:
            del asked[number], left[number]


def read_prompts(path: Path, defaults: PromptRequest, base: SamplingParams) -> list[PromptRequest]:
    """A prompts file: .jsonl, an object a line with `prompt` and any of REQUEST_FIELDS and of SamplingParams' fields; anything
    else is text, a prompt a line, blank lines left out. What a line does not say comes from `defaults` and `base`.

    UserError naming file and line for a line that cannot be used, or a file without prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({one_line(error)})") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = _values(line) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()}
            requests.append(_request(values, defaults, base))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise UserError(f"--prompts {path}: holds no prompt")
    return requests


def _values(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON ({one_line(error)})") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError('expected an object with a "prompt", for example {"prompt": "a red heart", "seed": 7}')
    return values


def _request(values: dict[str, Any], defaults: PromptRequest, base: SamplingParams) -> PromptRequest:
    valid = (*REQUEST_FIELDS, *SamplingParams.model_fields)
    for name in values:
        if name not in valid:
            raise UserError(f"unknown field '{name}'{nearest_name(name, valid)}")
    sampling = {name: value for name, value in values.items() if name not in REQUEST_FIELDS}
    params = SamplingParams.parse({**base.plain(), **sampling}, "its sampling") if sampling else base
    own = {name: values.get(name, getattr(defaults, name)) for name in REQUEST_FIELDS}
    return PromptRequest(params=params, **own)
