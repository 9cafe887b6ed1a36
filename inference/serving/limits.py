"""Limits of the server, each with its default, and the reading of a bounded body."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from inference.serving.errors import ApiError

MAX_REQUEST_PROMPT = 2000
"""Characters of a prompt; other commands take more."""
MAX_IMAGES = 10
"""The largest n that OpenAI's API has; --max-n may lower it."""
MAX_BODY_BYTES = 64 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_LAYOUT_SIDE = 128


@dataclass(frozen=True)
class Limits:
    """Limits of one server, in seconds and counts.

    queue: jobs that wait. deadline: from a request to the end of its reply. drain: for what is
    being drawn when the server is stopped. read: for a whole request to arrive. write: for a client
    that does not take its reply. keep_alive: of an idle connection.
    """

    max_n: int = MAX_IMAGES
    queue: int = 32
    deadline: float = 120.0
    drain: float = 30.0
    connections: int = 512
    read: float = 20.0
    write: float = 30.0
    keep_alive: int = 15


async def read_json(request: Request) -> dict[str, Any]:
    """Read a JSON object of at most MAX_BODY_BYTES.

    ApiError 413 for a longer body, 415 for another content type, 400 for anything else.
    """
    # a web page elsewhere can send text/plain without asking the browser's permission (CORS)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "the body must be JSON, with 'Content-Type: application/json'")
    body = await _read_body(request)
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and a number of 5,000 digits
        raise ApiError(400, f"the body is no JSON that can be read: {error}"[:300]) from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(values).__name__}")
    return values


async def _read_body(request: Request) -> bytes:
    too_long = ApiError(413, f"the body is longer than {MAX_BODY_BYTES:,} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise too_long

    body = bytearray()
    while True:
        # not request.stream(), after which nobody could wait for http.disconnect
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise too_long
        if not message.get("more_body", False):
            return bytes(body)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
