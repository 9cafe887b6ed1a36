"""Jacobi decoding: several tokens per decoder step, with the same tokens as plain decoding.

With fixed noise (`inference.sampling`), a token is a function of the tokens before it. Each step
guesses a window of positions after the known tokens and draws all of them again, each from the
guesses before it. As far as the guesses were right, the drawn tokens are those of plain decoding,
and so is the first one that differs; the rest are better guesses for the next step. Nearly equal
distributions draw the same token under the same noise, so guesses settle long before everything
before them has.

This is speculative Jacobi decoding (Teng et al. 2024, https://arxiv.org/abs/2410.01699) with
Gumbel-coupled drafts (So et al. 2025, https://arxiv.org/abs/2510.24211), accepted where equal: not
only the distribution but every token is that of plain decoding (up to rounding: docs/sampling.md).
"""

# Axes: B images, w positions of the window, N image tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.generation.batch import Generation
from inference.generation.drawing import draw_tokens, guidance_scales


def jacobi_steps(generation: Generation) -> Iterator[Tensor]:
    """Yield the next ids [B] int64 for each of the N positions, as soon as all images have theirs.

    Each image's window starts at its own first unknown token. The speed-up is N /
    `generation.forwards` tokens per step.
    """
    decoder, total = generation.decoder, generation.total
    window = min(generation.request.window, total - decoder.first_position)
    groups, cache = generation.prefill()
    # [B], the number of known tokens of each image
    known = torch.zeros(generation.request.rows, dtype=torch.int64, device=decoder.device)
    # [B, N + 1]: the begin slot, then the tokens; `begin` also marks tokens that were never guessed
    tokens = torch.full((len(known), total + 1), decoder.begin, device=decoder.device)
    if decoder.first_position == 1:
        tokens[:, 1] = generation.draw(decoder.first_logits(groups), 0)
        known += 1

    yielded = 0
    while yielded < total:
        complete = int(known.min())  # the only synchronisation with the device in a step
        for position in range(yielded, complete):
            yield tokens[:, position + 1].clone()
        yielded = complete
        if complete == total:
            return
        if complete >= generation.guided_steps and len(groups) == 2:
            groups, cache = generation.without_guidance(groups, cache)
        known = _draw_window(generation, tokens, known, window, groups, cache)


def _draw_window(generation: Generation, tokens: Tensor, known: Tensor, window: int,
                 groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
    """Draw the next `window` tokens of each image into `tokens`; return how many are known, [B]."""
    # near the end a window reaches back over known tokens
    start = known.clamp(max=generation.total - window)
    positions = start[:, None] + torch.arange(window, device=known.device)  # [B, w]
    previous = _guess_previous(tokens, known, positions, generation)  # [B, w]

    branches = len(groups)
    logits = generation.decoder.decode_at(
        previous.repeat(branches, 1), positions.repeat(branches, 1), groups, cache)  # [R, w, K]
    generation.forwards += 1

    # each position of the window is drawn as a row of its own
    params = generation.request.params
    scales = guidance_scales(params, generation.total, logits.device)[positions].view(-1, 1)
    keys = generation.token_keys.gather(1, positions).flatten()
    drawn = draw_tokens(logits.flatten(0, 1), scales, params, keys).view(positions.shape)  # [B, w]

    # a drawn token is right if all before it in the window was known, or guessed as then drawn
    is_new = positions >= known[:, None]
    guess_held = (drawn[:, :-1] == previous[:, 1:]) | ~is_new[:, :-1]
    first_held = torch.ones_like(is_new[:, :1])
    all_held = torch.cat([first_held, guess_held], dim=1).long().cumprod(dim=1).bool()
    accepted = all_held & is_new

    # known tokens stay, whatever rounding makes of drawing them again: some were yielded already
    kept = torch.where(is_new, drawn, tokens.gather(1, positions + 1))
    tokens.scatter_(1, positions + 1, kept)
    return known + accepted.sum(dim=1)


def _guess_previous(tokens: Tensor, known: Tensor, positions: Tensor,
                    generation: Generation) -> Tensor:
    """Return the token before each of `positions` [B, w], which may be a guess.

    It is known, or guessed by the last step, or else copied from a neighbour.
    """
    begin = generation.decoder.begin
    columns = generation.decoder.config.grid[1]
    previous = tokens.gather(1, positions)
    last_known = tokens.gather(1, known[:, None])
    # one row further up in the code grid
    above = tokens.gather(1, (positions - columns).clamp(min=0))
    neighbour = torch.where(above == begin, last_known, above)
    never_guessed = (previous == begin) & (positions > 0)
    return torch.where(never_guessed, neighbour, previous)
