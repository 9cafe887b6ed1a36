"""POST /v1/images/generations: from a checked request to its reply, whole or as a stream."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
from collections.abc import Awaitable, Callable

from PIL import Image
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inference.image_files.encode import encode_image
from inference.sampling import SamplingParams
from inference.serving.drawing import Drawing
from inference.serving.engine import (
    Failed,
    Finished,
    Job,
    NotServing,
    Overloaded,
    Partial,
    Started,
)
from inference.serving.errors import (
    ApiError,
    as_api_error,
    draining,
    invalid,
    overloaded,
    refused,
    too_late,
)
from inference.serving.limits import read_json
from inference.serving.logs import hashed
from inference.serving.openai_api import ImageRequest, check_size, parse_request
from inference.serving.replies import RefusedImage
from inference.serving.routes import record_of
from inference.serving.service import Service
from inference.serving.sse import EventWriter, while_connected
from tokenloom_common.errors import UserError

log = logging.getLogger(__name__)
Event = Started | Partial | Finished | Failed | None
"""An event of a job; None where none has come for QUIET_SECONDS."""
Handle = Callable[[Event], Awaitable[None]]
RANDOM_SEEDS = 1 << 32
"""Seeds that are chosen here; JavaScript holds them exactly."""
QUIET_SECONDS = 15.0
SMALL_PIXELS = 128 * 128
"""Images up to here are encoded in a millisecond or two, less than a change of threads takes."""


class Generations:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, within the deadline and while its client is there."""
        service = self.service
        request = Request(scope, receive, send)
        record = record_of(request)
        try:
            asked = parse_request(await read_json(request), service.limits)
            record.fields |= self._log_fields(asked)
            if service.draining:
                raise draining()
            with service.in_flight():
                await while_connected(request, self._answer(request, asked, send))
        except ClientDisconnect:
            raise
        except Exception as error:
            service.metrics.rejected.labels(as_api_error(error).code).inc()
            raise
        finally:
            service.metrics.request_seconds.observe(record.seconds)

    def _log_fields(self, asked: ImageRequest) -> dict[str, object]:
        fields: dict[str, object] = {
            "n": asked.images, "stream": bool(asked.stream),
            "prompt_characters": len(asked.prompt), "user": hashed(asked.end_user)}
        if self.service.log_prompts:
            fields |= {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
        return fields

    async def _answer(self, request: Request, asked: ImageRequest, send: Send) -> None:
        async with self.service.deadline(record_of(request).seconds):
            drawing = await self._prepare(request, asked)
        if asked.stream:
            await self._stream(drawing, send)
        else:
            await self._whole(drawing, request, send)

    async def _prepare(self, request: Request, asked: ImageRequest) -> Drawing:
        """Apply the hooks, and complete the request by the model's defaults."""
        service = self.service
        name = service.model_name(asked.model)
        record = record_of(request)
        record.fields["model"] = name
        described = await service.describe(name)
        drawing = Drawing(asked, name, described, record, is_shipped=name == service.shipped)
        check_size(asked, drawing.size)

        values = {**described["sampling"], **asked.sampling()}
        try:
            drawing.params = SamplingParams.parse(values, "sampling parameters")
        except UserError as error:
            raise invalid(error) from None
        drawing.seed = secrets.randbelow(RANDOM_SEEDS) if asked.seed is None else asked.seed
        record.fields["seed"] = drawing.seed
        drawing.prepared = await service.prepare(name, asked.prompt)
        if drawing.prepared.refusal is not None:
            raise refused(f"the prompt was refused ({drawing.prepared.refusal})")
        return drawing

    # ---- the two forms of a reply

    async def _whole(self, drawing: Drawing, request: Request, send: Send) -> None:
        files: dict[int, tuple[Finished, str]] = {}

        async def handle(event: Event) -> None:
            if isinstance(event, Finished) and await self._passes(drawing, event):
                encoded = await self._encode(drawing, event.image, event.seed)
                files[event.index] = event, encoded

        await self._draw(drawing, handle)
        if not files:
            raise drawing.refusal()
        body = drawing.reply([files[index] for index in sorted(files)])
        response = Response(body.model_dump_json(exclude_none=True), media_type="application/json")
        await response(request.scope, request.receive, send)

    async def _stream(self, drawing: Drawing, send: Send) -> None:
        writer = EventWriter(send)

        async def handle(event: Event) -> None:
            if event is None:
                await writer.comment()
            elif isinstance(event, Partial):
                # refused ones are said when they are finished
                if await self.service.refusal(drawing.model, event.image) is not None:
                    return
                encoded = await self._encode(drawing, event.image, None)
                await writer.write(drawing.partial(event, encoded))
            elif isinstance(event, Finished) and await self._passes(drawing, event):
                encoded = await self._encode(drawing, event.image, event.seed)
                await writer.write(drawing.completed(event, encoded))

        try:
            await self._draw(drawing, handle)
            if drawing.refused:
                raise drawing.refusal()
        except Exception as error:
            if not writer.started:
                raise
            await writer.write({"type": "error", **self._late_error(drawing, error).body()})
        await writer.close()

    def _late_error(self, drawing: Drawing, error: Exception) -> ApiError:
        """Return the error of a stream that has begun, logged and counted as others are."""
        api_error = as_api_error(error)
        if api_error.status == 500:
            log.error("failed", exc_info=error, extra={"fields": {"request": drawing.record.id}})
        drawing.record.fields["error"] = api_error.code
        self.service.metrics.rejected.labels(api_error.code).inc()
        return api_error

    # ---- drawing

    async def _draw(self, drawing: Drawing, handle: Handle) -> None:
        """Submit the job and handle its events until all images are there.

        ApiError for a full queue, for a job that cannot be drawn, and at the deadline. The job is
        cancelled on every way out but the last image's.
        """
        service, record = self.service, drawing.record
        try:
            job = service.engine.submit(drawing.request())
        except Overloaded as error:
            raise overloaded(error.reason, error.retry_after) from None
        except NotServing as error:
            raise ApiError(503, str(error), headers={"Retry-After": "5"}) from None
        except UserError as error:
            raise invalid(error) from None
        left = drawing.asked.images
        reason = "client_left"
        try:
            async with service.deadline(record.seconds):
                while left:
                    event = await _next_event(job)
                    self._note(drawing, event)
                    if isinstance(event, (Finished, Failed)):
                        left -= 1
                    await handle(event)
        except Exception as error:
            reason = as_api_error(error).code
            raise
        finally:
            if left:
                job.cancel()
                service.metrics.cancelled.labels(reason).inc()

    def _note(self, drawing: Drawing, event: Event) -> None:
        """Take the event into the metrics. ApiError for an image that failed."""
        metrics, seconds = self.service.metrics, drawing.record.seconds
        if isinstance(event, Started):
            drawing.text_tokens = event.text_tokens
            metrics.queue_seconds.observe(seconds)
        elif isinstance(event, Partial) and not drawing.saw_partial:
            drawing.saw_partial = True
            metrics.first_partial_seconds.observe(seconds)
        elif isinstance(event, Failed):
            raise self._failure(drawing, event)

    def _failure(self, drawing: Drawing, event: Failed) -> Exception:
        if event.kind == "deadline":
            return too_late(self.service.limits.deadline)
        if event.kind == "shutdown":
            return draining()
        if event.kind == "invalid":
            # either text may be the one that the model cannot read
            param = "prompt" if drawing.asked.negative_prompt is None else None
            return ApiError(400, event.reason, param, "invalid_value")
        return event.error()

    async def _passes(self, drawing: Drawing, event: Finished) -> bool:
        """Whether a finished image may be handed out; counted, or noted as refused."""
        reason = await self.service.refusal(drawing.model, event.image)
        if reason is not None:
            drawing.refused.append(RefusedImage(index=event.index, seed=event.seed, reason=reason))
            return False
        self.service.metrics.images.labels(drawing.model).inc()
        return True

    async def _encode(self, drawing: Drawing, image: Image.Image, seed: int | None) -> str:
        """Return an image's file in base64, with its recipe if it is finished."""
        recipe = None if seed is None else drawing.recipe(seed)
        asked = drawing.asked
        arguments = image, asked.format, asked.output_compression, recipe
        if image.width * image.height <= SMALL_PIXELS:
            content = encode_image(*arguments)
        else:  # away from the event loop, which answers everyone
            content = await asyncio.to_thread(encode_image, *arguments)
        return base64.b64encode(content).decode("ascii")


async def _next_event(job: Job) -> Event:
    try:
        async with asyncio.timeout(QUIET_SECONDS):
            return await job.next_event()
    except TimeoutError:
        return None
