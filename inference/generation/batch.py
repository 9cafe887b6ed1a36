"""A batch of captions being generated: the request and its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.sampling import SamplingParams, guidance_at, guide, guided_steps, noise_keys, sample
from seq2seq import TextBatch


@dataclass(frozen=True)
class Request:
    """What to draw: captions [C, T], `images` pictures of each in a row, so B = C * images; seeds, one a picture.

    unguided: the text of the other branch, which guidance leads away from: one caption for all (the null caption or a negative
    prompt), or C of them. layout [B, L] is given, or None: sampled, where the model has one. window: tokens that Jacobi
    decoding (`inference.generation.jacobi`) works on at once; 1 = one after another.
    """

    captions: TextBatch
    unguided: TextBatch
    images: int
    params: SamplingParams
    seeds: list[int]
    layout: Tensor | None = None
    window: int = 1

    @property
    def rows(self) -> int:
        """B."""
        return len(self.captions.text_mask) * self.images


class Generation:
    """One batch being drawn.

    `layout` [B, L] is known once `steps` has begun (None for models without); `forwards` counts the decoder's steps so far.
    The cache lives as long as the iterator that `steps` gives, and no longer.
    """

    def __init__(self, decoder: CachedDecoder, request: Request) -> None:
        self.decoder, self.request = decoder, request
        self.total = decoder.config.num_tokens
        self.layout = request.layout
        self.forwards = 0
        self.guided_steps = guided_steps(request.params, self.total)
        self._layout_steps = decoder.config.layout_tokens
        self._layout_guided = guided_steps(request.params, self._layout_steps)
        # one key for each token, the layout's first, whether it is given or not
        self._keys = noise_keys(request.seeds, self._layout_steps + self.total).to(decoder.device)

    @property
    def branches(self) -> int:
        """2 when guidance needs its second branch at some token, else 1."""
        return 2 if self.guided_steps or (self._layout_steps and self.layout is None and self._layout_guided) else 1

    @property
    def token_keys(self) -> Tensor:
        """Keys [B, N] of the image tokens' noise."""
        return self._keys[:, self._layout_steps:]

    def steps(self) -> Iterator[Tensor]:
        """Yield the next ids [B] int64 for each of the N positions."""
        groups, cache = self.begin()
        previous = None
        for position in range(self.total):
            if position == self.guided_steps:
                groups, cache = self.without_guidance(groups, cache)
            repeated = previous.repeat(2) if previous is not None and len(groups) == 2 else previous
            logits = self.decoder.decode_one(repeated, position, groups, cache)
            self.forwards += 1
            previous = self.draw(logits, position)
            yield previous

    def begin(self) -> tuple[list[CaptionMemory], SelfCache]:
        """The captions' memory, one group a branch, and a cache that holds what comes before the image."""
        request = self.request
        groups = [self.decoder.prefill(request.captions, request.images)]
        if self.branches == 2:
            others = len(request.unguided.text_mask)
            groups.append(self.decoder.prefill(request.unguided, request.rows // others))
        cache = self.decoder.new_cache(groups)
        if self._layout_steps:
            self.layout = self._put_layout(groups, cache)
        return groups, cache

    def without_guidance(self, groups: list[CaptionMemory], cache: SelfCache) -> tuple[list[CaptionMemory], SelfCache]:
        """The first branch alone."""
        return groups[:1], cache.rows(0, self.request.rows)

    def _put_layout(self, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """The layout [B, L] into the cache: the given one at once, else token after token as they are drawn."""
        if self.layout is not None:
            self.decoder.decode_layout(self.layout.repeat(len(groups), 1), 0, groups, cache)
            return self.layout
        drawn: list[Tensor] = []
        none_yet = torch.empty(cache.row_count, 0, dtype=torch.int64, device=self.decoder.device)
        logits = self.decoder.decode_layout(none_yet, 0, groups, cache)
        for position in range(self._layout_steps):
            drawn.append(self._draw(logits, position, self._layout_steps, self._keys[:, position]))
            logits = self.decoder.decode_layout(drawn[-1].repeat(len(groups))[:, None], position, groups, cache)
        return torch.stack(drawn, dim=1)

    def draw(self, logits: Tensor, position: int) -> Tensor:
        """The next ids [B] from logits of all rows at image token `position`."""
        return self._draw(logits, position, self.total, self.token_keys[:, position])

    def _draw(self, logits: Tensor, position: int, total: int, keys: Tensor) -> Tensor:
        params, logits, count = self.request.params, logits.float(), self.request.rows
        scale = guidance_at(params, position, total)
        if scale != 1.0:
            logits = guide(logits[:count], logits[count:], scale)
        return sample(logits[:count], params, keys)
