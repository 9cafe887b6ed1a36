"""One batch of captions: the request, and the state while its tokens are drawn."""

# Axes: B images, C captions, T text ids, R rows (B, or 2B under guidance), N image tokens, L layout
#       tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.drawing import count_branches, draw_at, put_layout
from inference.sampling import SamplingParams, guided_steps, noise_keys
from seq2seq import TextBatch


@dataclass(frozen=True)
class Request:
    """Captions [C, T] with `images` consecutive images each, so B = C * images; `seeds` holds one
    seed per image.

    unconditional: text of the second branch of classifier-free guidance (the null caption or a
    negative prompt): one for all captions, or C of them. layout [B, L]: None to sample it, where
    the model has one. window: tokens that Jacobi decoding (`inference.generation.jacobi`) works on
    at once; 1 = one after another.
    """

    captions: TextBatch
    unconditional: TextBatch
    images: int
    params: SamplingParams
    seeds: list[int]
    layout: Tensor | None = None
    window: int = 1

    @property
    def rows(self) -> int:
        """B, the rows of one branch."""
        return len(self.captions.text_mask) * self.images


class Generation:
    """The state of one request while its tokens are drawn.

    `layout` [B, L] is set once `steps` has started (None for models without one); `forwards` counts
    the decoder's steps. The cache belongs to the iterator that `steps` returns, so closing the
    iterator frees it.
    """

    def __init__(self, decoder: CachedDecoder, request: Request) -> None:
        self.decoder = decoder
        self.request = request
        self.total = decoder.config.num_tokens
        self.layout = request.layout
        self.forwards = 0
        self.guided_steps = guided_steps(request.params, self.total)
        self._layout_tokens = decoder.config.layout_tokens
        # the layout's keys come first even if it is given, so that the image's noise is the same
        keys = noise_keys(request.seeds, self._layout_tokens + self.total)  # [B, L + N]
        self._keys = keys.to(decoder.device)

    @property
    def branches(self) -> int:
        """2 if guidance needs its unconditional branch at any token, else 1."""
        return count_branches(self.request.params, self.decoder.config, self.layout is not None)

    @property
    def token_keys(self) -> Tensor:
        """Noise keys [B, N] of the image tokens."""
        return self._keys[:, self._layout_tokens:]

    def steps(self) -> Iterator[Tensor]:
        """Yield the next ids [B] int64 for each of the N positions."""
        groups, cache = self.prefill()
        previous = None
        for position in range(self.total):
            if position == self.guided_steps:  # from here on half the rows, half the work
                groups, cache = self.without_guidance(groups, cache)
            if previous is not None and len(groups) == 2:
                previous = previous.repeat(2)  # both branches read the same token
            logits = self.decoder.decode_one(previous, position, groups, cache)
            self.forwards += 1
            previous = self.draw(logits, position)
            yield previous

    def prefill(self) -> tuple[list[CaptionMemory], SelfCache]:
        """Return the captions' memory, one group per branch, and a cache up to token 0."""
        request = self.request
        groups = [self.decoder.prefill(request.captions, request.images)]
        if self.branches == 2:
            texts = len(request.unconditional.text_mask)
            groups.append(self.decoder.prefill(request.unconditional, request.rows // texts))

        cache = self.decoder.new_cache(groups)
        if self._layout_tokens:
            self.layout = put_layout(
                self.decoder, groups, cache, self.layout, request.params, self._keys)
        return groups, cache

    def without_guidance(self, groups: list[CaptionMemory],
                         cache: SelfCache) -> tuple[list[CaptionMemory], SelfCache]:
        """Return the conditional branch alone."""
        return groups[:1], cache.rows(0, self.request.rows)

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """Draw the ids [B] of image token `position` from logits [R, K]."""
        keys = self.token_keys[:, position]
        return draw_at(logits, position, self.total, self.request.params, keys)
