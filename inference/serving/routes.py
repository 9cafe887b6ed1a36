"""Routes with access decided on each, and the frame around every request.

The frame gives each request its id, its log line, its metrics, the security headers, and turns
every error into a reply of OpenAI's shape.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.serving.auth import ApiKey
from inference.serving.errors import ApiError, as_api_error, not_found
from inference.serving.logs import log_event
from inference.serving.metrics import Metrics

log = logging.getLogger(__name__)
CLIENT_LEFT = 499
"""Status of a request whose client left, in logs and metrics, as nginx has it."""
QUIET = ("/health", "/ready", "/metrics", "/", "/page/{name:path}")
"""Routes that are asked for all the time, or cost nothing: logged only where they fail."""
SECURITY_HEADERS = {
    # the page's images are data and blob URLs; all else comes from this server
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass
class Record:
    """Facts about a request for its log line; endpoints add `fields`."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    route: str = "none"
    status: int = 0
    start: float = field(default_factory=time.perf_counter)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.start


def record_of(request: Request) -> Record:
    """Return the record of a request."""
    return request.scope["tokenloom.record"]


# ---- access


class GuardedRoute(Route):
    """A route that needs the key, where there is one, unless it is public."""

    def __init__(self, path: str, endpoint: Callable[..., Any], key: ApiKey | None,
                 methods: tuple[str, ...] = ("GET",), public: bool = False) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.key = key
        self.public = public

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, then the method. ApiError 401 or 405."""
        request = Request(scope)
        record_of(request).route = self.path
        if self.key is not None and not self.public:
            self.key.check(request)
        assert self.methods is not None
        if scope["method"] not in self.methods:
            allowed = ", ".join(sorted(self.methods))
            raise ApiError(405, f"{scope['method']} is not for {self.path}; it takes {allowed}",
                           headers={"Allow": allowed})
        await self.app(scope, receive, send)


def guarded_router(routes: list[GuardedRoute], key: ApiKey | None) -> Router:
    """Return a router that needs the key for a path without a route too."""
    async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        if key is not None:
            key.check(request)
        raise not_found(request)

    # no redirects of slashes: each path has one route, or none
    return Router(routes, redirect_slashes=False, default=nowhere)


# ---- the frame


class Frame:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics,
                 check: Callable[[Request], None]) -> None:
        self.app = app
        self.metrics = metrics
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        record = Record()
        scope["tokenloom.record"] = record

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", []), *_own_headers(message, record)]
            await send(message)

        try:
            self.check(Request(scope))
            await self.app(scope, receive, framed)
        except ClientDisconnect:
            record.status = CLIENT_LEFT
        except Exception as error:
            await self._answer(error, record, scope, receive, framed)
        finally:
            self._close(record, scope)

    async def _answer(self, error: Exception, record: Record, scope: Scope, receive: Receive,
                      send: Send) -> None:
        api_error = as_api_error(error)
        if api_error.status == 500:
            log.error("failed", exc_info=error, extra={"fields": {"request": record.id}})
        if record.status:  # a reply has begun: the client sees that the connection breaks
            raise error
        record.fields["error"] = api_error.code
        await api_error.response()(scope, receive, send)

    def _close(self, record: Record, scope: Scope) -> None:
        """Log the request and count it."""
        status = record.status or 500
        method = scope["method"] if scope["method"] in _METHODS else "other"
        is_quiet = record.route in QUIET and status in (200, 304, 503)
        level = logging.DEBUG if is_quiet else logging.INFO
        log_event(log, level, "request", request=record.id, method=method,
                  route=record.route, status=status, seconds=round(record.seconds, 4),
                  **record.fields)
        self.metrics.requests.labels(record.route, method, str(status)).inc()


_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def _own_headers(message: Message, record: Record) -> list[tuple[bytes, bytes]]:
    """Return the security headers and the request's id; no-store where no other rule is given."""
    headers = {**SECURITY_HEADERS, "x-request-id": record.id}
    if not any(name.lower() == b"cache-control" for name, _ in message.get("headers", [])):
        headers["cache-control"] = "no-store"
    return [(name.encode(), value.encode()) for name, value in headers.items()]


