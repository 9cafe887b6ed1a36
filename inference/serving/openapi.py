"""/openapi.json: OpenAPI 3.1, built from the models that check requests and make replies."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from inference.serving.errors import OF_STATUS
from inference.serving.limits import MAX_BODY_BYTES, Limits
from inference.serving.openai_api import ImageRequest
from inference.serving.replies import (
    CompletedEvent,
    ErrorReply,
    Health,
    ImagesReply,
    Model,
    ModelList,
    PartialEvent,
    Readiness,
    Words,
)

_MODELS: tuple[type[BaseModel], ...] = (
    ImageRequest, ImagesReply, PartialEvent, CompletedEvent, Model, ModelList, Words, Health,
    Readiness, ErrorReply)
_REF = "#/components/schemas/{model}"
_MEANING = {
    400: "a request that cannot be drawn; `param` names the field", 401: "no key, or a wrong one",
    403: "a host that this server does not answer to", 404: "no such path, model or image",
    405: "another method", 413: f"a body of more than {MAX_BODY_BYTES:,} bytes",
    415: "a body that is not JSON", 429: "the queue is full, or a model has no room now",
    500: "the server failed",
    503: "shutting down, too many connections, or a model that cannot be served",
    504: "not finished before the deadline",
}


def openapi_document(limits: Limits, needs_key: bool) -> str:
    """Return the document as JSON."""
    _, definitions = models_json_schema([(one, "validation") for one in _MODELS], ref_template=_REF)
    schemas = definitions["$defs"]
    count = schemas["ImageRequest"]["properties"]["n"]["anyOf"][0]
    count["maximum"] = limits.max_n

    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Tokenloom", "version": "1",
                 "description": "OpenAI's images API, served by `tokenloom serve`."},
        "paths": _paths(needs_key),
        "components": {"schemas": schemas, "responses": _error_responses()}}
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return json.dumps(document)


def _error_responses() -> dict[str, Any]:
    """Return the error of each status by its name in `components`."""
    responses: dict[str, Any] = {}
    for status in OF_STATUS:
        response: dict[str, Any] = {"description": _MEANING[status],
                                    "content": _json_content("ErrorReply")}
        if status == 429:
            response["headers"] = {"Retry-After": {
                "required": True, "description": "seconds", "schema": {"type": "integer",
                                                                       "minimum": 1}}}
        responses[f"Error{status}"] = response
    return responses


def _json_content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}


def _paths(needs_key: bool) -> dict[str, Any]:
    def operation(name: str, summary: str, content: dict[str, Any], errors: tuple[int, ...] = (),
                  public: bool = False, **more: Any) -> dict[str, Any]:
        statuses = {400, 403, 405, 500, 503, *errors}
        if needs_key and not public:
            statuses.add(401)
            more["security"] = [{"key": []}]
        replies: dict[str, Any] = {"200": {"description": summary, "content": content}}
        for status in sorted(statuses):
            replies[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
        return {"operationId": name, "summary": summary, "responses": replies, **more}

    def parameter(name: str, text: str) -> dict[str, Any]:
        return {"name": name, "in": "path", "required": True, "description": text,
                "schema": {"type": "string"}}

    text = {"schema": {"type": "string"}}
    body = {"required": True, "content": {"application/json": {
        "schema": {"$ref": _REF.format(model="ImageRequest")},
        "example": {"prompt": "a red heart", "n": 2, "seed": 7}}}}
    event = {"type": "object", "required": ["event", "data"], "properties": {
        "event": {"enum": ["image_generation.partial_image", "image_generation.completed",
                           "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"}}}
    drawn = {**_json_content("ImagesReply"), "text/event-stream": {"schema": event}}
    file: dict[str, Any] = {"*/*": {"schema": {}}}
    ready = operation("ready", "Whether requests are taken", _json_content("Readiness"))
    # the one reply of 503 that is no error
    ready["responses"]["503"] = {"description": "Not now", "content": {"application/json": {
        "schema": {"anyOf": [{"$ref": _REF.format(model="Readiness")},
                             {"$ref": _REF.format(model="ErrorReply")}]}}}}
    return {
        "/v1/images/generations": {"post": operation(
            "generate", "Images of a prompt", drawn, (404, 413, 415, 429, 504), requestBody=body,
            description="With `stream`: server-sent events `image_generation.partial_image` "
            "(PartialEvent) and `image_generation.completed` (CompletedEvent), one for each image; "
            "an event `error` (ErrorReply) where a stream that has begun cannot go on.")},
        "/v1/images/{image}/words": {"get": operation(
            "words", "Where each word of the prompt acted in an image", _json_content("Words"),
            (404, 429, 504), parameters=[parameter("image", "`id` of an image drawn lately")])},
        "/v1/models": {"get": operation("models", "All models", _json_content("ModelList"))},
        "/v1/models/{model}": {"get": operation(
            "model", "One model", _json_content("Model"), (404,),
            parameters=[parameter("model", "its `id`")])},
        "/health": {"get": operation("health", "Whether the process answers",
                                     _json_content("Health"), public=True)},
        "/ready": {"get": ready},
        "/metrics": {"get": operation("metrics", "Metrics for Prometheus", {"text/plain": text})},
        "/openapi.json": {"get": operation("openapi", "This document",
                                           {"application/json": {"schema": {"type": "object"}}})},
        "/": {"get": operation("page", "The page", {"text/html": text}, (404,), public=True)},
        "/page/{name}": {"get": operation(
            "page_file", "A file of the page", file, (404,), public=True,
            parameters=[parameter("name", "the file's name")])},
    }
