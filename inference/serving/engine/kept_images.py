"""Finished images that can still be asked about, in a bounded store, and the questions."""

# Axes: N image tokens, L layout tokens

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from inference.attention_maps import WordMap
from inference.serving.engine.jobs import NotServing, Overloaded, UnknownImageError


@dataclass
class KeptImage:
    """An image's model, prompt and tokens [N] (layout [L]), and its words once they were asked for.
    """

    model: str
    prompt: str
    tokens: Tensor
    layout: Tensor | None = None
    words: list[WordMap] | None = None


class KeptImages:
    """The last `limit` images by id. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._images: OrderedDict[str, KeptImage] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: KeptImage) -> str:
        """Keep an image and return its id, which nobody can guess."""
        image_id = secrets.token_hex(12)
        with self._lock:
            self._images[image_id] = image
            while len(self._images) > self.limit:
                self._images.popitem(last=False)
        return image_id

    def get(self, image_id: str) -> KeptImage:
        """Return an image by id. UnknownImageError if it is not kept."""
        with self._lock:
            image = self._images.get(image_id)
        if image is None:
            raise UnknownImageError(f"no image '{image_id[:40]}': the last {self.limit} are kept")
        return image


class WordQuestions:
    """Questions for the words of images, answered one by one between two decoder steps.

    They are asked in any thread, one at a time, and answered in the model thread. An answer is kept
    with its image.
    """

    def __init__(self, words: Callable[[KeptImage], list[WordMap]], limit: int) -> None:
        """words: computes them. limit: questions that may wait."""
        self._words = words
        self._limit = limit
        self._waiting: deque[tuple[KeptImage, Future[list[WordMap]]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, image: KeptImage) -> Future[list[WordMap]]:
        """Queue a question. Overloaded where too many wait."""
        if len(self._waiting) >= self._limit:
            raise Overloaded(1.0, f"{self._limit} requests for words wait already")
        answer: Future[list[WordMap]] = Future()
        self._waiting.append((image, answer))
        return answer

    def answer_one(self) -> None:
        """Answer the oldest question, if there is one."""
        if not self._waiting:
            return
        image, answer = self._waiting.popleft()
        if not answer.set_running_or_notify_cancel():  # whoever asked has left
            return
        try:
            if image.words is None:
                image.words = self._words(image)
            answer.set_result(image.words)
        except Exception as error:
            answer.set_exception(error)

    def refuse(self, reason: str) -> None:
        """Answer all questions with NotServing."""
        while self._waiting:
            _, answer = self._waiting.popleft()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(NotServing(reason))
