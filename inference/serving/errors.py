"""Errors in OpenAI's shape, every 4xx and 5xx: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from tokenloom_common.errors import UserError, one_line

INVALID = "invalid_request_error"
SERVER = "server_error"

ERROR_TYPES = (INVALID, "authentication_error", "permission_error", "rate_limit_error",
               "image_generation_user_error", SERVER)
"""Values of `type`; the openai client chooses its exception by the status."""

OF_STATUS = {
    400: (INVALID, "bad_request"), 401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"), 404: (INVALID, "not_found"),
    405: (INVALID, "method_not_allowed"), 413: (INVALID, "request_too_large"),
    415: (INVALID, "unsupported_media_type"), 429: ("rate_limit_error", "rate_limit_exceeded"),
    500: (SERVER, "internal_error"), 503: (SERVER, "unavailable"),
    504: (SERVER, "deadline_exceeded"),
}
"""Status -> its `type`, and its `code` where an error names no other."""


class ApiError(Exception):
    """A reply that is an error: its status, and the four fields of its body."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, error_type: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        default_type, default_code = OF_STATUS.get(
            status, (INVALID if status < 500 else SERVER, f"http_{status}"))
        self.status = status
        self.message = message
        self.param = param
        self.code = code or default_code
        self.error_type = error_type or default_type
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the body of the reply."""
        return {"error": {"message": self.message, "type": self.error_type, "param": self.param,
                          "code": self.code}}

    def response(self) -> Response:
        """Return the whole reply."""
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def overloaded(reason: str, retry_after: float) -> ApiError:
    """Return the 429 of a request that there is no room for now."""
    # a whole number of at least 1: the client sleeps for exactly this long
    seconds = max(1, math.ceil(retry_after))
    return ApiError(429, f"{reason}; try again in {seconds} s",
                    headers={"Retry-After": str(seconds)})


def too_late(seconds: float) -> ApiError:
    """Return the 504 of a request that met its deadline."""
    return ApiError(504, f"not finished within {seconds:g} s; its work has been stopped. Ask for "
                    "fewer images at a time, or try again later")


def draining() -> ApiError:
    """Return the 503 of a server that is being stopped."""
    return ApiError(503, "the server is shutting down; try again later", code="shutting_down",
                    headers={"Retry-After": "5"})


def model_unavailable(name: str) -> ApiError:
    """Return the 503 of a model that the server cannot load, whatever is asked of it."""
    return ApiError(503, f"model {name} cannot be served; the server's log has the reason",
                    "model", "model_unavailable")


def invalid(error: UserError) -> ApiError:
    """Return the 400 of a request that the engine refuses."""
    return ApiError(400, one_line(error), code="invalid_value")


def refused(reason: str, param: str | None = "prompt") -> ApiError:
    """Return the 400 of a prompt or a picture that the safety filter refuses."""
    return ApiError(400, reason, param, "moderation_blocked", "image_generation_user_error")


def as_api_error(error: Exception) -> ApiError:
    """Return the reply for any exception; nothing of an unforeseen one is told to the client.

    A UserError is unforeseen too: here the user is who runs the server, and it may name its files.
    """
    if isinstance(error, ApiError):
        return error
    return ApiError(500, "the server failed; its log has the reason under this request's id")


def not_found(request: Request) -> ApiError:
    """Return the 404 of a path that no route has."""
    return ApiError(404, f"no such path: {request.method} {request.url.path[:200]}")
