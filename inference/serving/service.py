"""State that all endpoints of one server share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from PIL import Image

from inference.hooks.applied import Hooks, PreparedPrompt
from inference.hooks.concepts_file import Concepts
from inference.hooks.known_concepts import unknown_note
from inference.serving.auth import ApiKey
from inference.serving.engine import Engine
from inference.serving.errors import ApiError, draining, model_unavailable, too_late
from inference.serving.limits import Limits
from inference.serving.logs import log_event
from inference.serving.metrics import Metrics
from tokenloom_common.errors import nearest_name, one_line

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_NO_HOOKS = Hooks()


@dataclass
class Service:
    """The engine, the hooks and the limits, and whether the server is being stopped.

    hooks, concepts: of each model that has some, by its name. host: the address that it listens on.
    shipped: the name of the model that comes with Tokenloom, where it is served.
    """

    engine: Engine
    hooks: Mapping[str, Hooks] = field(default_factory=dict)
    concepts: Mapping[str, Concepts] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    key: ApiKey | None = None
    host: str = "127.0.0.1"
    shipped: str | None = None
    log_prompts: bool = False
    loading: bool = False
    draining: bool = False
    active: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    _stopped: bool = False
    _clocks: set[asyncio.Timeout] = field(default_factory=set)
    # users' functions need not be safe to call from two threads
    _hook_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "hooks"))

    def __post_init__(self) -> None:
        self.metrics.watch(self.engine.stats)
        self.metrics.in_flight.set_function(lambda: self.active)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request that is queued or drawn."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    @asynccontextmanager
    async def deadline(self, spent: float = 0.0) -> AsyncIterator[None]:
        """Bound what is inside by the deadline, of which `spent` seconds are gone.

        ApiError 504 at the deadline, 503 at the end of a server that is being stopped.
        """
        try:
            async with asyncio.timeout(0 if self._stopped else self.limits.deadline - spent) as one:
                self._clocks.add(one)
                try:
                    yield
                finally:
                    self._clocks.discard(one)
        except TimeoutError:
            raise (draining() if self._stopped else too_late(self.limits.deadline)) from None

    def stop_all(self) -> None:
        """End all requests that are queued or drawn with 503, at the server's end."""
        self._stopped = True
        now = asyncio.get_running_loop().time()
        for clock in list(self._clocks):
            if not clock.expired():
                clock.reschedule(now)

    # ---- hooks, called away from the event loop and one call at a time

    async def prepare(self, model: str, prompt: str) -> PreparedPrompt:
        """Check and expand a prompt; without an expander, say where the model knows none of it."""
        hooks = self.hooks.get(model, _NO_HOOKS)
        prepared = PreparedPrompt(prompt)
        if hooks.expander is not None or hooks.safety is not None:
            prepared = await self._call(hooks.prepare, prompt)
        concepts = self.concepts.get(model)
        if hooks.expander is None and concepts is not None and prepared.refusal is None:
            return replace(prepared, note=unknown_note(concepts, prompt))
        return prepared

    async def refusal(self, model: str, image: Image.Image) -> str | None:
        """Return why the safety filter does not let an image through; None if it does."""
        hooks = self.hooks.get(model, _NO_HOOKS)
        if hooks.safety is None:
            return None
        return (await self._call(hooks.check_images, [image]))[0]

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._hook_thread, function, *arguments)

    # ---- models

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names of the models; the first one is taken where none is named."""
        return self.engine.models.names

    async def describe(self, name: str) -> dict[str, Any]:
        """Describe a model that is there, as GET /v1/models does.

        ApiError 503 for one that cannot be served, with the reason in the log.
        """
        try:
            # away from the event loop: the first description reads the model's files
            return await asyncio.to_thread(self.engine.models.describe, name)
        except Exception as error:
            log_event(log, logging.ERROR, "a model cannot be served", model=name,
                      reason=one_line(error))
            raise model_unavailable(name) from None

    def model_name(self, asked: str | None) -> str:
        """Return the name of a model that is there; the first one's for None. ApiError 404."""
        names = self.model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ApiError(404, f"model: there is no '{asked[:80]}'{nearest_name(asked, names)}",
                           "model", "model_not_found")
        return asked
