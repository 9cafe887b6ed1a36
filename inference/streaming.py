"""Streaming: one step of a growing image, and previews within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

Decode = Callable[[Tensor], list[Image.Image]]
"""Image tokens [B, N] -> B images."""

class GenerationStep:
    """One position of a stream: `position` (0 .. N-1), `image_tokens` [B, position+1] so far, `is_last`, `preview`."""

    def __init__(self, decode: Decode, image_tokens: Tensor, total: int,
                 budget: PreviewBudget | None = None) -> None:
        self._decode = decode
        self._budget = budget
        self.image_tokens = image_tokens
        self.position = image_tokens.shape[1] - 1
        self.total = total

    @property
    def is_last(self) -> bool:
        """Whether the picture is complete."""
        return self.position == self.total - 1

    @property
    def previews(self) -> list[Image.Image]:
        """The pictures so far, decoded when asked for; positions not yet drawn repeat the last token."""
        missing = self.total - self.image_tokens.shape[1]
        filled = torch.cat([self.image_tokens, self.image_tokens[:, -1:].expand(-1, missing)], dim=1)
        if self._budget is None:
            return self._decode(filled)
        return self._budget.spent_on(lambda: self._decode(filled))

    @property
    def preview(self) -> Image.Image:
        """The first picture so far."""
        return self.previews[0]


Result = TypeVar("Result")


SHARE = 0.035
"""Of the time without previews. 5 % is promised; that caches a preview swept slow the next steps is not on its clock."""


class PreviewBudget:
    """Counts the time of decoding and of previews.

    longest: seconds that a preview takes, where one is known from before. While none is, the first waits for half the tokens.
    """

    def __init__(self, longest: float = 0.0, share: float = SHARE, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._clock = share, clock
        self._start = clock()
        self._not_ours = 0.0
        self.preview_seconds = 0.0
        self.longest = longest

    @property
    def decoding_seconds(self) -> float:
        """Since the start, without previews and without what callers did."""
        return self._clock() - self._start - self._not_ours

    def allows(self, done: int, total: int) -> bool:
        """Whether one more preview, as long as the longest so far, stays within the share of the time so far."""
        if not self.longest:
            return 2 * done >= total
        return self.preview_seconds + self.longest <= self.share * self.decoding_seconds

    def spent_on(self, preview: Callable[[], Result]) -> Result:
        """Run a preview and count it."""
        start = self._clock()
        result = preview()
        taken = self._clock() - start
        self.preview_seconds += taken
        self.longest = max(self.longest, taken)
        return result

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Time that is not decoding's."""
        start = self._clock()
        try:
            yield
        finally:
            self._not_ours += self._clock() - start
