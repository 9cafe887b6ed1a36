"""Replies of OpenAI's images API and of our own routes; /openapi.json describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from inference.serving.errors import ERROR_TYPES
from inference.serving.openai_api import ImageRequest, OutputFormat


class Reply(BaseModel):
    """Base of replies: fields that are None are left out."""

    model_config = ConfigDict(frozen=True)


class InputDetails(Reply):
    """Tokens of the prompt, by kind."""

    text_tokens: int
    image_tokens: int = 0


class OutputDetails(Reply):
    """Tokens that were drawn, by kind."""

    image_tokens: int
    text_tokens: int = 0


class Usage(Reply):
    """Tokens read and drawn."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails

    @classmethod
    def of(cls, text_tokens: int, image_tokens: int) -> Usage:
        """Count a prompt's tokens and the drawn ones."""
        return cls(input_tokens=text_tokens, output_tokens=image_tokens,
                   total_tokens=text_tokens + image_tokens,
                   input_tokens_details=InputDetails(text_tokens=text_tokens),
                   output_tokens_details=OutputDetails(image_tokens=image_tokens))


class ImageData(Reply):
    """One image. `seed` and `id` are ours; `revised_prompt` is what was drawn if not the prompt."""

    b64_json: str
    seed: int
    id: str
    revised_prompt: str | None = None
    note: str | None = None
    """What --expand says about the prompt, for a person."""


class RefusedImage(Reply):
    """An image that the safety filter refused, and why; `index` of the n images."""

    index: int
    seed: int
    reason: str


class ImagesReply(Reply):
    """The reply of POST /v1/images/generations."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    size: str
    usage: Usage
    model: str
    refused: list[RefusedImage] | None = None
    safety_identifier: str | None = None


class StreamEvent(Reply):
    """Fields of both events of a stream; `image_index` is ours: which of the n images."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    image_index: int
    seed: int


class PartialEvent(StreamEvent):
    """An image while it is drawn."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedEvent(StreamEvent):
    """An image that is finished, with its own share of the usage."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    id: str
    usage: Usage
    revised_prompt: str | None = None
    note: str | None = None
    safety_identifier: str | None = None


class Model(Reply):
    """An entry of GET /v1/models; `tokenloom` describes the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenloom"
    tokenloom: dict[str, Any]


class ModelList(Reply):
    """The reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Word(Reply):
    """A word of the prompt, prompt[start:end], and how much each part of the image attended to it.

    weights: rows of the grid of image tokens.
    """

    word: str
    start: int
    end: int
    weights: list[list[float]]


class Words(Reply):
    """The reply of GET /v1/images/{id}/words."""

    words: list[Word]


class Health(Reply):
    """The reply of GET /health."""

    status: Literal["ok"] = "ok"


class Readiness(Reply):
    """The reply of GET /ready."""

    ready: bool
    reason: str | None = None


class ErrorBody(Reply):
    """The four fields of an error."""

    message: str
    type: Literal[ERROR_TYPES]  # type: ignore[valid-type]
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """The reply of every 4xx and 5xx."""

    error: ErrorBody


REPLY_QUALITIES = ("low", "medium", "high", "xhigh", "max")
"""Values of `quality` in a reply; a request may also have `auto` and two older ones."""


def reply_quality(request: ImageRequest, default: str) -> Any:
    """Return the `quality` that a reply names: the request's own, or the default."""
    return request.quality if request.quality in REPLY_QUALITIES else default
