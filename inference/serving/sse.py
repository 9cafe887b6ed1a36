"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Send

Result = TypeVar("Result")


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await the work, and cancel it once the client has left. ClientDisconnect then.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, watcher):
            if not one.done():
                one.cancel()
                # its cleanup, which cancels the job, is done before the request ends
                with suppress(asyncio.CancelledError):
                    await one


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventWriter:
    """A reply of server-sent events; it begins with the first one, so that an error before it can
    still be a reply with a status of its own."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, data: Mapping[str, Any]) -> None:
        """Send one event, named by its `type`; waits while the client does not take it."""
        # JSON has no bare line break, so that the data is one line
        await self._write(f"event: {data['type']}\ndata: {json.dumps(data)}\n\n")

    async def comment(self) -> None:
        """Send a line that clients skip: proxies close silent connections."""
        await self._write(": still drawing\n\n")

    async def close(self) -> None:
        """End the reply."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, text: str) -> None:
        if not self.started:
            self.started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                       (b"x-accel-buffering", b"no")]  # nginx would collect events
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
