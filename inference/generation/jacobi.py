"""Jacobi decoding: several tokens a step, the same tokens as one after another.

With its noise fixed (`inference.sampling`), a token is a function of the tokens before it. A window of positions that follow
the tokens known so far is guessed, and one step of the decoder draws all of them again, each from the guesses before it. As
far as the guesses were right the new tokens are what plain decoding would draw, and so is the first that differs; the rest
are better guesses for the next step. Nearly equal distributions draw the same token under the same noise, so guesses settle
long before everything before them has: this is speculative Jacobi decoding (Teng et al. 2024, https://arxiv.org/abs/2410.01699)
with its drafts Gumbel-coupled (So et al. 2025, https://arxiv.org/abs/2510.24211), accepted where equal, so that not the
distribution alone but every token is that of plain decoding (but for rounding: docs/sampling.md, Seeds).
"""

# Axes: B pictures, w positions of the window, N image tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.batch import Generation
from inference.sampling import guidance_at, guide, sample


def jacobi_steps(generation: Generation) -> Iterator[Tensor]:
    """Yield the next ids [B] int64 for each of the N positions, as soon as all pictures have theirs.

    Every picture's window begins at its own first unknown token. `generation.forwards` counts the steps: N / forwards tokens a
    step are what it gained.
    """
    total, width = generation.total, min(generation.request.window, generation.total - generation.decoder.first_position)
    groups, cache = generation.begin()
    device = generation.decoder.device
    known = torch.zeros(generation.request.rows, dtype=torch.int64, device=device)  # [B] tokens known of each picture
    tokens = torch.full((len(known), total + 1), generation.decoder.begin, device=device)  # [B, N + 1]: begin, then tokens
    yielded = 0
    if generation.decoder.first_position == 1:
        tokens[:, 1] = generation.draw(generation.decoder.first_logits(groups), 0)
        known += 1
    while yielded < total:
        least = int(known.min())  # one wait for the device a step
        for position in range(yielded, least):
            yield tokens[:, position + 1].clone()
        yielded = least
        if least == total:
            return
        if least >= generation.guided_steps and len(groups) == 2:
            groups, cache = generation.without_guidance(groups, cache)
        known = _step(generation, tokens, known, width, groups, cache)


def _step(generation: Generation, tokens: Tensor, known: Tensor, width: int, groups: list[CaptionMemory],
          cache: SelfCache) -> Tensor:
    """Draw a window of `width` tokens of each picture again, into `tokens` -> how many are known now [B]."""
    first = known.clamp(max=generation.total - width)  # near the end a window reaches back over tokens that are known
    positions = first[:, None] + torch.arange(width, device=known.device)  # [B, w]
    before = _guessed(tokens, known, positions, generation)  # [B, w]: what stands before each position
    both, at = before.repeat(len(groups), 1), positions.repeat(len(groups), 1)  # of every branch
    logits = generation.decoder.decode_at(both, at, groups, cache)
    generation.forwards += 1
    drawn = _draw(generation, logits, positions)
    # a token is right if everything before it was: known, or guessed as it came out
    fresh = positions >= known[:, None]
    right = (drawn[:, :-1] == before[:, 1:]) | ~fresh[:, :-1]
    counted = torch.cat([torch.ones_like(fresh[:, :1]), right], dim=1).long().cumprod(dim=1).bool() & fresh
    tokens.scatter_(1, positions + 1, torch.where(fresh, drawn, tokens.gather(1, positions + 1)))
    return known + counted.sum(dim=1)


def _guessed(tokens: Tensor, known: Tensor, positions: Tensor, generation: Generation) -> Tensor:
    """The tokens before `positions` [B, w]: known ones, guesses of the step before, and at first sight a neighbour."""
    begin, columns = generation.decoder.begin, generation.decoder.config.grid[1]
    before = tokens.gather(1, positions)
    last = tokens.gather(1, known[:, None])  # the last known token
    above = tokens.gather(1, (positions - columns).clamp(min=0))
    guess = torch.where(above == begin, last, above)
    return torch.where((before == begin) & (positions > 0), guess, before)


def _draw(generation: Generation, logits: Tensor, positions: Tensor) -> Tensor:
    """Ids [B, w] from logits [B (twice under guidance), w, K] of `positions` [B, w]."""
    params, count = generation.request.params, len(positions)
    logits = logits.float()
    guided = logits[:count]
    if len(logits) > count:
        scales = torch.tensor([guidance_at(params, at, generation.total) for at in range(generation.total)],
                              device=logits.device)
        guided = guide(guided, logits[count:], scales[positions][..., None])
    keys = generation.token_keys.gather(1, positions)
    return sample(guided.flatten(0, 1), params, keys.flatten()).view(positions.shape)
