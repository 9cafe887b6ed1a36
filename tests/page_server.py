"""A stand-in for `tokenloom serve`: the page's files and the API that the page uses, with canned pictures that grow."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from inference.serving.errors import ApiError

PAGE = Path(__file__).resolve().parents[1] / "inference" / "serving" / "page"
SECURITY = {"Content-Security-Policy":
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
SAMPLING = {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 64, "top_p": 1.0}
DEFAULTS = {**SAMPLING, "guidance_schedule": "constant", "min_p": 0.0}
LAYOUT = {"kind": "colors", "grid": [4, 4], "classes": 27}
STEPS = 4  # three partial pictures, then the whole


@dataclass
class Behaviour:
    """How the server answers; tests change it."""

    seconds: float = 0.05  # between two pictures of a stream
    held: bool = False  # no picture goes on after its first part
    failures: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)  # of the next requests, in order
    key: str | None = None
    models: tuple[str, ...] = ("small",)
    layouts: bool = False
    note: str | None = None
    forget: bool = False  # the words of pictures
    models_failure: bool = False
    late_error: ApiError | None = None  # of a stream, in place of the whole picture
    keys: list[str | None] = field(default_factory=list)
    cut: bool = False  # the stream ends before its picture does
    requests: list[dict[str, Any]] = field(default_factory=list)
    word_requests: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0


class PageServer:
    """The stand-in, running in a thread. `behaviour` is replaced between tests."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.prompts: dict[str, str] = {}
        routes = [Route("/", self._index), Route("/v1/models", self._models),
                  Route("/v1/images/generations", self._draw, methods=["POST"]),
                  Route("/v1/images/{id}/words", self._words),
                  Mount("/page", StaticFiles(directory=PAGE))]
        self.app = Starlette(routes=routes)
        self.url = ""

    async def _index(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", headers=SECURITY)

    async def _models(self, request: Request) -> Response:
        refused = self._unauthorized(request)
        if refused:
            return refused
        if self.behaviour.models_failure:
            return _error(500, "no models")
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "tokenloom",
                 "tokenloom": self._description(name)} for name in self.behaviour.models]
        return JSONResponse({"object": "list", "data": data})

    def _description(self, name: str) -> dict[str, Any]:
        sampling = DEFAULTS if name == "small" else {**DEFAULTS, "guidance_scale": 5.0}
        layout = LAYOUT if self.behaviour.layouts and name == "small" else None
        return {"title": f"Pictures by {name}", "fingerprint": name, "weights": "float32",
                "sampling": sampling, "layout": layout}

    async def _draw(self, request: Request) -> Response:
        refused = self._unauthorized(request)
        if refused:
            return refused
        body = await request.json()
        self.behaviour.requests.append(body)
        if self.behaviour.failures:
            status, message, extra = self.behaviour.failures.pop(0)
            return _error(status, message, **extra)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for step in range(1, STEPS + 1):
                await asyncio.sleep(self.behaviour.seconds)
                whole = step == STEPS
                if whole and self.behaviour.cut:
                    return
                if whole and self.behaviour.late_error:
                    event = {"type": "error", **self.behaviour.late_error.body()}
                    yield f"event: error\ndata: {json.dumps(event)}\n\n"
                    return
                kind = "completed" if whole else "partial_image"
                data = {"type": f"image_generation.{kind}", "b64_json": _base64(picture(body, step / STEPS))}
                if whole:
                    identity = f"img-{body['seed']}-{body['guidance_scale']}-{body['temperature']}"
                    self.prompts[identity] = body["prompt"]
                    data |= {"id": identity, "seed": body["seed"], "usage": {"total_tokens": 64}}
                    if self.behaviour.note:
                        data |= {"revised_prompt": "cat", "note": self.behaviour.note}
                        self.prompts[identity] = "cat"
                else:
                    data["partial_image_index"] = step - 1
                yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"
                while self.behaviour.held:
                    await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            self.behaviour.cancelled += 1
            raise

    async def _words(self, request: Request) -> Response:
        identity = request.path_params["id"]
        self.behaviour.word_requests[identity] += 1
        if identity not in self.prompts or self.behaviour.forget:
            return _error(404, "no such picture")
        return JSONResponse({"words": words(self.prompts[identity])})

    def _unauthorized(self, request: Request) -> Response | None:
        key, given = self.behaviour.key, request.headers.get("authorization")
        self.behaviour.keys.append(given)
        if key is None or given == f"Bearer {key}":
            return None
        return _error(401, "wrong or missing API key", code="invalid_api_key")


def picture(body: dict[str, Any], share: float, **values: Any) -> bytes:
    """Return a PNG whose upper `share` is drawn; its recipe is the request and `values`, without what is None."""
    seed = int(body["seed"])
    image = Image.new("RGB", (32, 32), (90, 90, 90))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 31, round(32 * share) - 1), fill=(seed * 53 % 256, seed * 101 % 256, 160))
    pen.ellipse((8, 2, 24, 18), fill=(255, 220, 80))
    info = PngInfo()
    recipe = {"prompt": body["prompt"], "seed": seed, "negative_prompt": body.get("negative_prompt"),
              **{name: body[name] for name in SAMPLING}, "model": body["model"], **values}
    given = {name: value for name, value in recipe.items() if value is not None}
    info.add_itxt("tokenloom", json.dumps(given, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def words(prompt: str) -> list[dict[str, Any]]:
    """Return a word's part of the picture: the first painted the top left, the next the top right, and so on."""
    found, at = [], 0
    for number, word in enumerate(prompt.split()):
        start = prompt.index(word, at)
        at = start + len(word)
        weights = [[0.01] * 4 for _ in range(4)]
        weights[3 * (number // 2 % 2)][3 * (number % 2)] = 0.9
        found.append({"word": word, "start": start, "end": at, "weights": weights})
    return found


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _error(status: int, message: str, param: str | None = None, code: str | None = None,
           retry_after: int | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


@contextmanager
def page_server() -> Iterator[PageServer]:
    """Run the stand-in on a free port of the loopback."""
    stand_in = PageServer()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config(stand_in.app, log_level="error", lifespan="off",
                                               timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield stand_in
        server.should_exit = True
        thread.join(10)


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGBA").tobytes()
