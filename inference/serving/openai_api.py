"""Requests of OpenAI's images API, and the extensions of ours.

https://developers.openai.com/api/reference/resources/images; field by field in docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from inference.serving.engine.jobs import MAX_PARTIAL_IMAGES
from inference.serving.errors import ApiError
from inference.serving.limits import (
    MAX_IMAGES,
    MAX_LAYOUT_SIDE,
    MAX_REQUEST_PROMPT,
    Limits,
)
from tokenloom_common.errors import nearest_name

MAX_SEED = (1 << 63) - MAX_IMAGES
"""Image i has seed + i, and the last one's is an int64 too."""
MAX_NAME = 256
Prompt = Annotated[str, Field(max_length=MAX_REQUEST_PROMPT)]
Identifier = Annotated[str, Field(max_length=MAX_NAME)]
OutputFormat = Literal["png", "webp", "jpeg"]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


class ImageRequest(BaseModel):
    """The body of POST /v1/images/generations; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False,
                              use_attribute_docstrings=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_PROMPT)]
    """A caption."""
    model: Identifier | None = None
    """A name of GET /v1/models; the server's first one when left out."""
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    """Images; 1 when left out."""
    size: Annotated[str, Field(max_length=32)] | None = None
    """`auto`, or the model's own `WIDTHxHEIGHT`."""
    response_format: Literal["b64_json"] | None = None
    """Images come in the reply; there are no URLs."""
    output_format: OutputFormat | None = None
    """png when left out."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of webp and jpeg, 100 when left out; of png, 100 alone."""
    background: Literal["auto", "opaque"] | None = None
    """Images have no transparency."""
    quality: Quality | None = None
    """Accepted, and changes nothing."""
    style: Literal["vivid", "natural"] | None = None
    """Accepted, and changes nothing."""
    moderation: Literal["low", "auto"] | None = None
    """Accepted, and changes nothing."""
    user: Identifier | None = None
    """Accepted; logged as a hash. `safety_identifier` is its new name."""
    safety_identifier: Identifier | None = None
    """Accepted; logged as a hash."""
    stream: bool | None = None
    """Reply with server-sent events."""
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    """With `stream`: previews of each image while it is drawn."""
    # not OpenAI's
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Image i is drawn with seed + i; a random one when left out."""
    negative_prompt: Prompt | None = None
    """Unconditional text for classifier-free guidance."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    """1 = off; the model's own when left out, as for all that follow."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 = always the likeliest token."""
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    """Keep the k likeliest tokens; 0 = all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the likeliest tokens up to this mass; 1 = all."""
    layout: Annotated[
        list[Annotated[list[Annotated[int, Field(ge=0, le=1 << 20)]],
                       Field(min_length=1, max_length=MAX_LAYOUT_SIDE)]],
        Field(min_length=1, max_length=MAX_LAYOUT_SIDE)] | None = None
    """Rows of class numbers, for models with layouts; sampled when left out."""

    @model_validator(mode="after")
    def _fields_that_belong_together(self) -> ImageRequest:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        if self.output_compression not in (None, 100) and self.format == "png":
            raise ValueError("output_compression below 100 needs output_format webp or jpeg")
        if self.layout is not None and len({len(row) for row in self.layout}) != 1:
            raise ValueError("layout must have rows of one length")
        return self

    @property
    def format(self) -> OutputFormat:
        """The format of the images."""
        return self.output_format or "png"

    @property
    def images(self) -> int:
        """How many images."""
        return self.n or 1

    @property
    def end_user(self) -> str | None:
        """The end user's identifier, `safety_identifier` before `user`."""
        return self.safety_identifier or self.user

    def sampling(self) -> dict[str, Any]:
        """Return the sampling parameters that the request gives."""
        names = ("guidance_scale", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def parse_request(values: Mapping[str, Any], limits: Limits) -> ImageRequest:
    """Check the body of a request. ApiError 400 naming the field and what it may be."""
    try:
        request = ImageRequest.model_validate(dict(values))
    except ValidationError as error:
        raise _explained(error) from None
    if request.images > limits.max_n:
        raise ApiError(400, f"n: this server draws at most {limits.max_n} images a request, got "
                       f"{request.images}", "n", "invalid_value")
    return request


def check_size(request: ImageRequest, own: str) -> None:
    """Raise ApiError 400 for a size that is not the model's own."""
    if request.size not in (None, "auto", own):
        raise ApiError(400, f"size: this model draws {own}, got '{request.size}'; send '{own}', or "
                       "'auto'", "size", "invalid_value")


_REMEDIES = {
    "background": "images have no transparency: send 'auto' or 'opaque'",
    "response_format": "images come in the reply as 'b64_json'; there are no URLs",
}


def _explained(error: ValidationError) -> ApiError:
    """Return the first mistake; a misspelt field before what is missed because of it."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    field = path[0] if path else None
    shown = str(first["input"])[:80]
    if first["type"] == "extra_forbidden":
        nearest = nearest_name(str(field), ImageRequest.model_fields)
        return ApiError(400, f"unknown field '{str(field)[:80]}'{nearest}", str(field)[:80],
                        "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{field}: this field is required", field,
                        "missing_required_parameter")

    message = first["msg"].removeprefix("Value error, ")
    if field is None:  # a rule about several fields begins with the first one's name
        first_word = message.split()[0]
        param = first_word if first_word in ImageRequest.model_fields else None
        return ApiError(400, message, param, "invalid_value")
    if field in _REMEDIES:
        return ApiError(400, f"{field}: {_REMEDIES[field]}, got '{shown}'", field, "invalid_value")
    if first["type"] in ("string_too_long", "string_too_short"):
        return ApiError(400, f"{field}: {message}, got {len(first['input']):,}", field,
                        "invalid_value")
    return ApiError(400, f"{field}: {message}, got {shown!r}", field, "invalid_value")
