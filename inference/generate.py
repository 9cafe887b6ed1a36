"""Captions -> image tokens, one token after another, with guidance; a layout first, for models that have one."""

# Axes: B pictures, C captions, n pictures a caption, N image tokens, L layout tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.decoder import CachedDecoder
from inference.kv_cache import CaptionMemory, SelfCache
from inference.sampling import SamplingParams, guidance_at, guide, sample, uniform_numbers
from seq2seq import TextBatch


@dataclass(frozen=True)
class Request:
    """What to draw: captions [C, T], `images` pictures of each in a row, so B = C * images; seeds, one a picture.

    unguided: the text of the other branch, which guidance leads away from: one caption for all (the null caption or a negative
    prompt), or C of them. layout [B, L] is given, or None: sampled, where the model has one.
    """

    captions: TextBatch
    unguided: TextBatch
    images: int
    params: SamplingParams
    seeds: list[int]
    layout: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.captions.text_mask) * self.images


class Generation:
    """One batch being drawn. `layout` [B, L] is known once `steps` has begun (None for models without)."""

    def __init__(self, decoder: CachedDecoder, request: Request) -> None:
        self.decoder, self.request = decoder, request
        self.layout = request.layout
        self.guided = request.params.guidance_scale != 1.0
        self._layout_steps = decoder.config.layout_tokens
        # one number for each token, the layout's first, whether it is given or not
        self._uniform = uniform_numbers(request.seeds, self._layout_steps + decoder.config.num_tokens)

    def steps(self) -> Iterator[Tensor]:
        """Yield the next ids [B] int64 for each of the N positions."""
        decoder, total = self.decoder, self.decoder.config.num_tokens
        groups = self._prefill()
        cache = decoder.new_cache(groups)
        if self._layout_steps:
            self.layout = self._put_layout(groups, cache)
        previous = None
        for position in range(total):
            logits = decoder.decode_one(previous, position, groups, cache)
            next_ids = self._draw(logits, position, total, self._uniform[:, self._layout_steps + position])
            yield next_ids
            previous = torch.cat([next_ids] * self._branches)

    @property
    def _branches(self) -> int:
        return 2 if self.guided else 1

    def _prefill(self) -> list[CaptionMemory]:
        request = self.request
        groups = [self.decoder.prefill(request.captions, request.images)]
        if self.guided:
            others = len(request.unguided.text_mask)
            groups.append(self.decoder.prefill(request.unguided, request.rows // others))
        return groups

    def _put_layout(self, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """The layout [B, L] into the cache: the given one at once, else token after token as they are drawn."""
        if self.layout is not None:
            self.decoder.decode_layout(torch.cat([self.layout] * self._branches), 0, groups, cache)
            return self.layout
        drawn: list[Tensor] = []
        none_yet = torch.empty(self.request.rows * self._branches, 0, dtype=torch.int64,
                               device=self.request.captions.text_mask.device)
        logits = self.decoder.decode_layout(none_yet, 0, groups, cache)
        for position in range(self._layout_steps):
            drawn.append(self._draw(logits, position, self._layout_steps, self._uniform[:, position]))
            logits = self.decoder.decode_layout(torch.cat([drawn[-1]] * self._branches)[:, None], position, groups, cache)
        return torch.stack(drawn, dim=1)

    def _draw(self, logits: Tensor, position: int, total: int, uniform: Tensor) -> Tensor:
        params, logits = self.request.params, logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, guidance_at(params, position, total))
        return sample(logits, params, uniform)


def generate_tokens(decoder: CachedDecoder, request: Request) -> tuple[Tensor, Tensor | None]:
    """All steps -> image_tokens [B, N] int64 in raster order, and the layout [B, L] of models that have one."""
    generation = Generation(decoder, request)
    tokens = torch.stack(list(generation.steps()), dim=1)
    return tokens, generation.layout
