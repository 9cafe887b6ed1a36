"""One request while it is drawn, and the parts of its reply."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.hooks.applied import PreparedPrompt
from inference.image_files.recipe import Recipe
from inference.requests import PromptRequest
from inference.sampling import SamplingParams
from inference.serving.engine import EngineRequest, Finished, Partial
from inference.serving.errors import ApiError, refused
from inference.serving.openai_api import ImageRequest
from inference.serving.replies import (
    CompletedEvent,
    ImageData,
    ImagesReply,
    PartialEvent,
    RefusedImage,
    Usage,
    reply_quality,
)
from inference.serving.routes import Record


@dataclass
class Drawing:
    """A request, what completes it, and what is known of it so far.

    described: of the model, as GET /v1/models has it.
    """

    asked: ImageRequest
    model: str
    described: dict[str, Any]
    record: Record
    is_shipped: bool = False
    prepared: PreparedPrompt = field(default_factory=lambda: PreparedPrompt(""))
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    text_tokens: int = 0
    saw_partial: bool = False
    refused: list[RefusedImage] = field(default_factory=list)

    @property
    def size(self) -> str:
        """The images' WIDTHxHEIGHT."""
        return str(self.described["size"])

    def request(self) -> EngineRequest:
        """Return what the engine is asked for."""
        asked = self.asked
        prompt = PromptRequest(self.prepared.drawn, asked.images, self.seed, self.params,
                               asked.negative_prompt, asked.layout)
        return EngineRequest(self.model, prompt, asked.partial_images or 0)

    def recipe(self, seed: int) -> Recipe:
        """Return the recipe of the image of this seed."""
        extra: dict[str, Any] = {"weights": self.described["weights"]}
        if self.asked.layout is not None:
            extra["layout"] = [number for row in self.asked.layout for number in row]
        # None stands for the shipped model; of others the name, since a folder is nobody's business
        model = None if self.is_shipped else self.model
        return Recipe(self.asked.prompt, seed, self.params, self.asked.negative_prompt,
                      self.prepared.revised, model, self.described["fingerprint"], extra)

    @property
    def note(self) -> str | None:
        """Notes about the prompt that a person is shown."""
        notes = [self.prepared.note] if self.prepared.note else []
        length = self.described["text_length"]
        # 1: a class, which always fills it
        if length > 1 and self.text_tokens >= length:
            notes.append(f"the prompt fills all {length} text tokens that this model reads; what "
                         "is beyond them is not drawn")
        return "; ".join(notes) or None

    def refusal(self) -> ApiError:
        """Return the error that says which images the safety filter refused."""
        first = self.refused[0]
        seeds = ", ".join(str(one.seed) for one in self.refused)
        return refused(f"the safety filter refused the images of seeds {seeds} ({first.reason})",
                       None)

    # ---- parts of a reply

    def reply(self, files: Sequence[tuple[Finished, str]]) -> ImagesReply:
        """Return the whole reply, with what the safety filter left."""
        data = [ImageData(b64_json=encoded, seed=event.seed, id=event.id,
                          revised_prompt=self.prepared.revised, note=self.note)
                for event, encoded in files]
        return ImagesReply(
            created=int(time.time()), data=data, output_format=self.asked.format,
            quality=reply_quality(self.asked, "high"), size=self.size,
            usage=self._usage(self.asked.images), model=self.model, refused=self.refused or None,
            safety_identifier=self.asked.end_user)

    def partial(self, event: Partial, encoded: str) -> dict[str, Any]:
        """Return the event of an image while it is drawn."""
        common = self._event(event.index, encoded)
        partial = PartialEvent(**common, partial_image_index=event.partial_index)
        return partial.model_dump(exclude_none=True)

    def completed(self, event: Finished, encoded: str) -> dict[str, Any]:
        """Return the event of a finished image."""
        completed = CompletedEvent(
            **self._event(event.index, encoded), id=event.id, usage=self._usage(1),
            revised_prompt=self.prepared.revised, note=self.note,
            safety_identifier=self.asked.end_user)
        return completed.model_dump(exclude_none=True)

    def _event(self, index: int, encoded: str) -> dict[str, Any]:
        return {"b64_json": encoded, "created_at": int(time.time()), "size": self.size,
                "quality": reply_quality(self.asked, "auto"),
                "output_format": self.asked.format, "image_index": index, "seed": self.seed + index}

    def _usage(self, images: int) -> Usage:
        return Usage.of(self.text_tokens, images * self.described["image_tokens"])
