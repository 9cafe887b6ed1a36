"""Streaming: the steps of a growing image, and previews within a time budget."""

# Axes: B images, N image tokens

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from inference.generation.batch import Generation
from inference.generation.ways import token_steps

Result = TypeVar("Result")
Decode = Callable[[Tensor], list[Image.Image]]
"""Image tokens so far [B, n] -> B images."""
SHARE = 0.035
"""Time of previews as a share of the time without them.

5 % is promised: a preview also slows the steps after it, by what it evicts from the caches, and
that is not on its clock.
"""


class GenerationStep:
    """One position (0 .. N-1) of a stream: `image_tokens` [B, position+1] so far, `preview`."""

    def __init__(self, decode: Decode, image_tokens: Tensor, total: int,
                 budget: PreviewBudget | None = None) -> None:
        self._decode = decode
        self._budget = budget
        self.image_tokens = image_tokens
        self.position = image_tokens.shape[1] - 1
        self.total = total

    @property
    def is_last(self) -> bool:
        """Whether the image is complete."""
        return self.position == self.total - 1

    @property
    def previews(self) -> list[Image.Image]:
        """The images so far, decoded on access; what is not drawn yet is empty."""
        if self._budget is None:
            return self._decode(self.image_tokens)
        return self._budget.spent_on(lambda: self._decode(self.image_tokens))

    @property
    def preview(self) -> Image.Image:
        """The first image so far."""
        return self.previews[0]


class PreviewBudget:
    """Measure the time of decoding and of previews; decide whether another preview is affordable.

    longest: seconds of a preview, if known from an earlier stream; if not, the first preview waits
    for half the tokens.
    """

    def __init__(self, longest: float = 0.0, share: float = SHARE,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.longest = longest
        self.preview_seconds = 0.0
        self._clock = clock
        self._start = clock()
        self._caller_seconds = 0.0

    @property
    def decoding_seconds(self) -> float:
        """Seconds since the start, without those of the caller (and so of previews)."""
        return self._clock() - self._start - self._caller_seconds

    def allows(self, done: int, total: int) -> bool:
        """Whether one more preview, as long as the longest so far, stays within the share."""
        if not self.longest:  # the cost is unknown: one preview, halfway, finds it out
            return 2 * done >= total
        return self.preview_seconds + self.longest <= self.share * self.decoding_seconds

    def spent_on(self, preview: Callable[[], Result]) -> Result:
        """Run a preview and count its time."""
        start = self._clock()
        result = preview()
        seconds = self._clock() - start
        self.preview_seconds += seconds
        self.longest = max(self.longest, seconds)
        return result

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Leave the time inside this context out of decoding_seconds."""
        start = self._clock()
        try:
            yield
        finally:
            self._caller_seconds += self._clock() - start


def stream_steps(generation: Generation, every: int | None, decode: Decode,
                 known_seconds: float) -> Iterator[GenerationStep]:
    """Draw all tokens, yielding a step after every `every` of them and after the last one.

    every: None to yield whenever the budget allows a preview.
    known_seconds: time of a preview, 0 if unknown.
    """
    total = generation.total
    budget = PreviewBudget(known_seconds)
    drawn: list[Tensor] = []
    for ids in token_steps(generation):
        drawn.append(ids)
        done = len(drawn)
        is_last = done == total
        is_due = budget.allows(done, total) if every is None else done % every == 0
        if is_last or is_due:
            tokens = torch.stack(drawn, dim=1).cpu()
            with budget.outside():  # the caller's time between two steps is not the stream's
                # the last image is the result, not a preview: it is not on the budget
                yield GenerationStep(decode, tokens, total, None if is_last else budget)
