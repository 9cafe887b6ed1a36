"""The ASGI application: the table of routes, and the small endpoints."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from inference.serving.auth import check_host, is_loopback
from inference.serving.engine import NotServing, Overloaded, UnknownImageError
from inference.serving.errors import ApiError, draining, overloaded
from inference.serving.images import Generations
from inference.serving.metrics import CONTENT_TYPE
from inference.serving.openapi import openapi_document
from inference.serving.page_files import page_response, read_page
from inference.serving.replies import Health, Model, ModelList, Readiness, Word, Words
from inference.serving.routes import Frame, GuardedRoute, guarded_router
from inference.serving.service import Service
from inference.serving.sse import while_connected


def build_app(service: Service) -> ASGIApp:
    """Return the application. Every route but the public ones needs the key, where there is one."""
    endpoints = Endpoints(service)
    key = service.key
    routes = [
        GuardedRoute("/health", endpoints.health, key, public=True),
        GuardedRoute("/ready", endpoints.ready, key),
        GuardedRoute("/metrics", endpoints.metrics, key),
        GuardedRoute("/openapi.json", endpoints.openapi, key),
        GuardedRoute("/v1/models", endpoints.models, key),
        GuardedRoute("/v1/models/{model:path}", endpoints.model, key),
        GuardedRoute("/v1/images/generations", Generations(service), key, methods=("POST",)),
        GuardedRoute("/v1/images/{image}/words", endpoints.words, key),
        GuardedRoute("/", endpoints.page, key, public=True),
        GuardedRoute("/page/{name:path}", endpoints.page, key, public=True),
    ]

    def check(request: Request) -> None:
        if is_loopback(service.host):
            check_host(request, service.host)

    return Frame(guarded_router(routes, key), service.metrics, check)


class Endpoints:
    """Everything but the generation of images."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = read_page()
        self._openapi = openapi_document(service.limits, service.key is not None)

    async def health(self, request: Request) -> Response:
        """Whether the process answers."""
        return _json(Health())

    async def ready(self, request: Request) -> Response:
        """Whether requests are taken: not while a model is loaded at the start, nor at the end."""
        service = self.service
        if service.draining:
            reason = "shutting down"
        elif service.loading:
            reason = "loading the model"
        elif not service.engine.ready:
            reason = "the model thread does not run"
        else:
            return _json(Readiness(ready=True))
        return _json(Readiness(ready=False, reason=reason), 503)

    async def metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """The description of this interface."""
        return Response(self._openapi, media_type="application/json")

    async def models(self, request: Request) -> Response:
        """All models that can be served."""
        found = []
        for name in self.service.model_names:
            with suppress(ApiError):
                found.append(await self._model(name))
        return _json(ModelList(data=found))

    async def model(self, request: Request) -> Response:
        """One model."""
        return _json(await self._model(self.service.model_name(request.path_params["model"])))

    async def _model(self, name: str) -> Model:
        described = await self.service.describe(name)
        return Model(id=name, created=described["created"], tokenloom=described)

    async def words(self, request: Request) -> Response:
        """Where each word of the prompt acted in an image that was drawn lately."""
        if self.service.draining:
            raise draining()
        try:
            async with self.service.deadline():
                with self.service.in_flight():
                    answer = self.service.engine.words(request.path_params["image"])
                    found = await while_connected(request, asyncio.wrap_future(answer))
        except Overloaded as error:
            raise overloaded(error.reason, error.retry_after) from None
        except NotServing as error:
            raise ApiError(503, str(error)) from None
        except UnknownImageError as error:
            raise ApiError(404, str(error), "image", "image_not_found") from None
        return _json(Words(words=[
            Word(word=one.word, start=one.start, end=one.end, weights=one.weights.tolist())
            for one in found]))

    async def page(self, request: Request) -> Response:
        """The page, or one of its files."""
        return page_response(self._page, request.path_params.get("name", "index.html"), request)


def _json(body: BaseModel, status: int = 200) -> Response:
    content = body.model_dump_json(exclude_none=True)
    return Response(content, status, media_type="application/json")
