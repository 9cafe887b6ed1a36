"""uvicorn with our limits on connections, and a stop that first finishes what is being drawn."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.serving.app import build_app
from inference.serving.errors import ApiError
from inference.serving.limits import MAX_HEADER_BYTES, Limits
from inference.serving.logs import log_event
from inference.serving.service import Service

log = logging.getLogger(__name__)


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 with a time limit on each request's arrival and on a reply that is not taken.

    uvicorn's own time-outs begin after the first reply; a connection that sends nothing, or a byte
    a minute, would stay for ever. `limits` is set by `server_config`.
    """

    limits = Limits()
    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections; try again later",
                                  headers={"Retry-After": "1"}))
            return
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_reading_clock()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request; its clock does not begin anew with each part."""
        if self._read_timer is None and not self._is_answering():
            self._expect_request()
        super().data_received(data)
        if self._is_answering() and not self.cycle.more_body:
            self._stop_reading_clock()

    def on_response_complete(self) -> None:
        """Begin the next request, of which a part may have come during the reply."""
        super().on_response_complete()
        if self._is_answering() and self.cycle.more_body and self._read_timer is None:
            self._expect_request()

    def pause_writing(self) -> None:
        """Begin the clock of a client that does not take its reply."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that clock."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in OpenAI's shape."""
        self._refuse(ApiError(400, "this is no HTTP/1.1 request that can be read, or its headers "
                                   f"are longer than {MAX_HEADER_BYTES:,} bytes"))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        self._read_timer = self.loop.call_later(self.limits.read, self.transport.abort)

    def _stop_reading_clock(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Send an error outside of the application, and close the connection."""
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        parts = (h11.Response(status_code=error.status, headers=headers),
                 h11.Data(data=bytes(response.body)), h11.EndOfMessage())
        try:
            output = b"".join(self.conn.send(part) or b"" for part in parts)
        except h11.LocalProtocolError:  # a reply has begun: nothing can be said any more
            output = b""
        self.transport.write(output)
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """A server that at the first SIGTERM or SIGINT takes no more work and finishes what it has.

    It ends with 0 once all requests are answered, at most `limits.drain` seconds later; what is not
    done by then gets 503. A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.failed = False
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal, end."""
        # not into _captured_signals, which uvicorn raises again at its end: the exit code is 0
        if self._drain_until is None:
            self.service.draining = True
            self._drain_until = time.monotonic() + self.service.limits.drain
            return
        log_event(log, logging.WARNING, "ended by a second signal", active=self.service.active)
        os._exit(128 + sig)

    @property
    def seconds_left(self) -> float:
        """Seconds that the stop may still take."""
        if self._drain_until is None:
            return self.service.limits.drain
        return max(0.0, self._drain_until - time.monotonic())

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop serving; asked ten times a second."""
        if self._drain_until is not None:
            late = time.monotonic() >= self._drain_until
            if late and self.service.active:
                log_event(log, logging.WARNING, "stopped before all was drawn",
                          active=self.service.active)
                self.service.stop_all()
            if late or not self.service.active:
                self.should_exit = True
        elif not self.service.loading and not self.service.engine.ready:
            # nothing can be drawn any more: ending lets a supervisor start anew
            log_event(log, logging.CRITICAL, "the model thread has ended")
            self.failed = self.should_exit = True
        return await super().on_tick(counter)


def make_server(service: Service) -> DrainingServer:
    """Return the server of a service; it is run with a bound socket."""
    limits = service.limits

    class Protocol(BoundedProtocol):
        pass

    Protocol.limits = limits
    options: dict[str, Any] = {
        "http": Protocol, "ws": "none", "loop": "asyncio", "lifespan": "off",
        "log_config": None, "access_log": False, "server_header": False,
        # X-Forwarded-For can be forged
        "proxy_headers": False,
        "timeout_keep_alive": limits.keep_alive, "timeout_graceful_shutdown": 5,
        "h11_max_incomplete_event_size": MAX_HEADER_BYTES}
    config = uvicorn.Config(build_app(service), **options)
    return DrainingServer(config, service)


