"""An engine without a model: jobs move when a test says so, which makes queues, deadlines and cancellations exact."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from PIL import Image

from inference.attention_maps import WordMap
from inference.serving.engine import (
    EngineRequest,
    Failed,
    Finished,
    Overloaded,
    Partial,
    Started,
    UnknownImageError,
)

DESCRIBED = {"size": "16x16", "grid": [4, 4], "image_tokens": 16, "text_length": 12, "title": "fake", "created": 1_700_000_000,
             "weights": "float32", "fingerprint": "0" * 16,
             "sampling": {"guidance_scale": 2.0, "temperature": 1.0, "top_k": 8, "top_p": 1.0}}


@dataclass
class Stats:
    queued: int = 0
    active_rows: int = 0
    rows: int = 4
    tokens_per_second: float = 0.0
    tokens: int = 0
    loaded: list = field(default_factory=list)
    model_bytes: int = 0


class FakeJob:
    def __init__(self, engine: FakeEngine, asked: EngineRequest) -> None:
        self.engine, self.asked = engine, asked
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue = asyncio.Queue()
        self.cancelled = False

    def put(self, event) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def next_event(self):
        return await self.events.get()

    def cancel(self) -> None:
        self.cancelled = True
        self.engine.leave(self)

    def start(self, text_tokens: int = 3) -> None:
        self.put(Started(self.asked.request.params, text_tokens))

    def partial(self, index: int, number: int = 0, side: int = 16) -> None:
        self.put(Partial(index, picture(self.asked.request.seed + index, side), number, 4))

    def fail(self, reason: str, kind: str) -> None:
        for index in range(self.asked.request.num_images):
            self.put(Failed(index, reason, kind))
        self.engine.leave(self)

    def play(self, text_tokens: int = 3) -> None:
        """All events of the job: partial images, then the finished ones."""
        request = self.asked.request
        self.start(text_tokens)
        for index in range(request.num_images):
            for number in range(self.asked.partial_images):
                self.put(Partial(index, picture(request.seed + index), number, 4 * number + 4))
        for index in range(request.num_images):
            seed = request.seed + index
            self.put(Finished(index, picture(seed), seed, None, f"image-{seed}"))
        self.engine.leave(self)


class Models:
    names = ("fake", "group/other")

    def describe(self, name: str) -> dict:
        return dict(DESCRIBED)


class FakeEngine:
    """plays: jobs end as soon as they are submitted; else they wait for `play`."""

    def __init__(self, plays: bool = True, queue: int = 32) -> None:
        self.models = Models()
        self.plays, self.queue = plays, queue
        self.jobs: list[FakeJob] = []
        self.waiting: list[FakeJob] = []
        self.ready = True
        self.figures = Stats()
        self.most_waiting = 0

    def submit(self, asked: EngineRequest) -> FakeJob:
        if len(self.waiting) >= self.queue:
            raise Overloaded(2.5)
        job = FakeJob(self, asked)
        self.jobs.append(job)
        self.waiting.append(job)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        if self.plays:
            job.play()
        return job

    def words(self, image_id: str) -> Future:
        if not image_id.startswith("image-"):
            raise UnknownImageError(f"id '{image_id[:40]}': no image of this id is kept")
        answer: Future = Future()
        answer.set_result([WordMap("a", 0, 1, torch.full((4, 4), 0.5))])
        return answer

    def leave(self, job: FakeJob) -> None:
        if job in self.waiting:
            self.waiting.remove(job)

    def stats(self) -> Stats:
        self.figures.queued = len(self.waiting)
        return self.figures


def picture(seed: int, side: int = 16) -> Image.Image:
    """Red as the seed is; larger ones are noise, which no format makes small."""
    if side > 16:
        return Image.effect_noise((side, side), 100).convert("RGB")
    return Image.new("RGB", (side, side), (seed % 256, 0, 0))
