"""Jobs of the server's engine: a request, the events of its images, and the errors of submitting
one. Each image of a job ends in exactly one event, Finished or Failed."""

# Axes: N image tokens, L layout tokens

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from PIL import Image
from torch import Tensor

from inference.requests import PromptRequest
from inference.sampling import SamplingParams
from tokenloom_common.errors import RunFailedError, UserError

FailureKind = Literal["cancelled", "deadline", "shutdown", "invalid", "error"]
"""Why an image was not drawn: cancelled by the caller; not done by the deadline; the server stops;
a prompt that the model cannot read; anything else (out of memory, a damaged model)."""
MAX_PARTIAL_IMAGES = 3


class UnknownModelError(UserError):
    """No model of this name is served."""


class UnknownImageError(UserError):
    """No image of this id is kept: it never was, or newer ones took its place."""


class Overloaded(Exception):
    """There is no room now. retry_after: seconds until what is in front should be drawn."""

    def __init__(self, retry_after: float, reason: str = "the queue is full") -> None:
        super().__init__(f"{reason}; try again in {retry_after:.0f} s")
        self.retry_after = retry_after
        self.reason = reason


class NotServing(Exception):
    """The engine takes no new jobs: it is draining or closed, or its thread has died."""


class JobFailedError(RunFailedError):
    """An image of a job that could not be drawn."""

    def __init__(self, reason: str, kind: FailureKind) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class EngineRequest:
    """A request for images of one model, by its name in `inference.serving.engine.models.Models`.

    partial_images: how many unfinished images are wanted of each image, 0 to 3, at equal shares of
    its tokens.
    """

    model: str
    request: PromptRequest
    partial_images: int = 0


# ---- events


@dataclass(frozen=True)
class Started:
    """The job has its turn: its first image is in the batch at the next step.

    params: as used, defaults included. text_tokens: text positions that the prompt takes.
    """

    params: SamplingParams
    text_tokens: int


@dataclass(frozen=True)
class Partial:
    """Image `index` with `drawn` of its tokens, the rest filled with a neutral code.

    partial_index: 0 for its first partial image.
    """

    index: int
    image: Image.Image
    partial_index: int
    drawn: int


@dataclass(frozen=True)
class Finished:
    """Image `index` is complete.

    tokens [N] int64, layout [L] int64 of models with one, both on the CPU. id: for `Engine.words`.
    """

    index: int
    image: Image.Image
    seed: int
    tokens: Tensor
    id: str
    layout: Tensor | None = None


@dataclass(frozen=True)
class Failed:
    """Image `index` will not come, with the reason in one line."""

    index: int
    reason: str
    kind: FailureKind = "error"

    def error(self) -> Exception:
        """Return the failure as an exception."""
        return JobFailedError(self.reason, self.kind)


Event = Started | Partial | Finished | Failed


# ---- a job


@dataclass(eq=False)
class Job:
    """A submitted request: its events are taken in a thread (by iterating) or in an event loop.

    Times are those of the engine's clock. `wake` tells the engine that something has changed.
    """

    request: EngineRequest
    submitted: float
    deadline: float
    wake: Callable[[], None] = lambda: None
    cancelled: bool = False
    _left: set[int] = field(default_factory=set)  # images without their last event
    _events: deque[Event] = field(default_factory=deque)  # published, not taken yet
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _listener: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        self._left = set(range(self.request.request.num_images))

    # ---- for the caller

    @property
    def done(self) -> bool:
        """Whether every image has ended, so that no further event comes."""
        return not self._left

    def cancel(self) -> None:
        """Drop what is not drawn yet; its rows are free after at most one decoder step."""
        self.cancelled = True
        self.wake()

    def take(self) -> list[Event]:
        """Return the events that were published since the last call."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
        return events

    def __iter__(self) -> Iterator[Event]:
        """Iterate over the events of a running engine, waiting for each."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self.done)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    async def next_event(self) -> Event:
        """Wait for the next event in an event loop, without blocking it.

        Safe to cancel: an event is taken or stays. After the last one it would wait for ever.
        """
        loop = asyncio.get_running_loop()
        while True:
            arrived = asyncio.Event()
            with self._changed:
                if self._events:
                    return self._events.popleft()
                self._listener = partial(loop.call_soon_threadsafe, arrived.set)
            await arrived.wait()

    # ---- for the engine

    @property
    def left(self) -> list[int]:
        """Indices of the images that have not ended."""
        with self._changed:
            return sorted(self._left)

    def publish(self, event: Event) -> None:
        """Hand an event to the caller. Events after an image's last one are dropped."""
        with self._changed:
            if isinstance(event, (Partial, Finished, Failed)) and event.index not in self._left:
                return
            self._events.append(event)
            if isinstance(event, (Finished, Failed)):
                self._left.discard(event.index)
            self._changed.notify_all()
            listener = self._listener
        if listener is not None:
            with suppress(RuntimeError):  # the caller's event loop is closed
                listener()

    def fail(self, reason: str, kind: FailureKind) -> int:
        """End every image that has not ended; returns their number."""
        left = self.left
        for index in left:
            self.publish(Failed(index, reason, kind))
        return len(left)
