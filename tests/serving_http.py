"""A real server on a free port of this process, for tests of the HTTP interface."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai

from inference.serving.limits import Limits
from inference.serving.server import DrainingServer, make_server
from inference.serving.service import Service
from tests.fake_engine import FakeEngine

KEY = "0123456789abcdef0123456789abcdef"
ROUTE = "/v1/images/generations"


class Running:
    """A server that answers, and a client of it."""

    def __init__(self, server: DrainingServer, port: int) -> None:
        self.server = server
        self.service = server.service
        self.engine: Any = server.service.engine
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=60)

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        """Return OpenAI's own client, which is told not to try again."""
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", **{"max_retries": 0, "timeout": 60, **options})


@contextmanager
def running(engine: Any = None, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """Serve until the block ends. options: of Service."""
    service = Service(engine or FakeEngine(), limits=limits or Limits(), **options)
    server = make_server(service)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    one = Running(server, listening.getsockname()[1])
    try:
        yield one
    finally:
        one.http.close()
        server.should_exit = server.force_exit = True
        thread.join(timeout=30)
        listening.close()
    assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds; the limit is for a machine under load, no measure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


# ---- requests by their bytes

def send(port: int, content: bytes) -> socket.socket:
    """Return a connection of its own on which these bytes were sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(content)
    return connection


def request_bytes(body: dict, extra: str = "") -> bytes:
    """Return a generation request. extra: lines of its head."""
    content = json.dumps(body).encode()
    head = (f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(content)}\r\n\r\n")
    return head.encode() + content


def until_closed(connection: socket.socket) -> bytes:
    """Return all that comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    connection.close()
    return b"".join(parts)
