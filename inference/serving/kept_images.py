"""Finished images that can still be asked about: a bounded store, newest last."""

# Axes: N image tokens, L layout tokens

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from inference.attention_maps import WordMap
from inference.serving.jobs import UnknownImageError


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
        number = secrets.token_hex(12)
        with self._lock:
            self._images[number] = image
            while len(self._images) > self.limit:
                self._images.popitem(last=False)
        return number

    def get(self, number: str) -> KeptImage:
        """Return an image by id. UnknownImageError if it is not kept."""
        with self._lock:
            image = self._images.get(number)
        if image is None:
            raise UnknownImageError(f"no image '{number[:40]}': the last {self.limit} are kept")
        return image
