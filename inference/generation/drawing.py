"""Draw the next token under classifier-free guidance, and put a layout before the image tokens.

The one place where logits of both branches become a token: plain decoding, Jacobi windows, CUDA
graphs and continuous batching all call `draw_tokens`.
"""

# Axes: B images, R rows (B, or 2B under guidance: the conditional branch, then the unconditional
#       one), K codebook size, N image tokens, L layout tokens

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.sampling import SamplingParams, guidance_at, guide, guided_steps, sample
from seq2seq import TransformerConfig


def count_branches(params: SamplingParams, config: TransformerConfig, layout_given: bool) -> int:
    """Return 2 if guidance needs the unconditional branch at any token to be drawn, else 1."""
    draws_layout = bool(config.layout_tokens) and not layout_given
    guided = guided_steps(params, config.num_tokens) > 0
    layout_guided = draws_layout and guided_steps(params, config.layout_tokens) > 0
    return 2 if guided or layout_guided else 1


@lru_cache(maxsize=64)
def guidance_scales(params: SamplingParams, total: int, device: torch.device) -> Tensor:
    """Return the guidance scale of each of `total` tokens, [total] float32 on `device`."""
    scales = [guidance_at(params, position, total) for position in range(total)]
    return torch.tensor(scales, device=device)


def draw_tokens(logits: Tensor, scale: float | Tensor, params: SamplingParams, keys: Tensor,
                allow_sync: bool = True) -> Tensor:
    """Draw ids [B] int64 from logits [R, K] under the noise keys [B]
    (`inference.sampling.noise_keys`).

    With R = 2B logits they are guided: `scale` is one for all images, or a tensor [B, 1].
    With R = B it is not read.
    allow_sync: False inside CUDA graph capture, where Python must not wait for a value; it does
    not change the ids.
    """
    images = len(keys)
    logits = logits.float()
    if len(logits) > images:
        logits = guide(logits[:images], logits[images:], scale)
    return sample(logits, params, keys, allow_sync)


def draw_at(logits: Tensor, position: int, total: int, params: SamplingParams,
            keys: Tensor) -> Tensor:
    """Draw ids [B], all at the same `position` of `total`; logits and keys as in draw_tokens."""
    scale = guidance_at(params, position, total)
    if scale == 1.0:
        logits = logits[: len(keys)]  # the conditional ones, which guiding by 1 would round
    return draw_tokens(logits, scale, params, keys)


def put_layout(decoder: CachedDecoder, groups: list[CaptionMemory], cache: SelfCache,
               layout: Tensor | None, params: SamplingParams, keys: Tensor) -> Tensor:
    """Put a layout into the cache of R rows and return it, [B, L].

    layout: None to draw it, token after token.
    groups: one memory per branch. keys [B, at least L]: the noise keys, the layout's first.
    """
    branches = len(groups)
    if layout is not None:
        decoder.decode_layout(layout.repeat(branches, 1), 0, groups, cache)
        return layout

    total = decoder.config.layout_tokens
    drawn: list[Tensor] = []
    no_tokens = torch.empty(cache.row_count, 0, dtype=torch.int64, device=decoder.device)
    logits = decoder.decode_layout(no_tokens, 0, groups, cache)
    for position in range(total):
        ids = draw_at(logits, position, total, params, keys[:, position])
        drawn.append(ids)
        # also after the last token, for its keys and values: its logits are not used
        logits = decoder.decode_layout(ids.repeat(branches)[:, None], position, groups, cache)
    return torch.stack(drawn, dim=1)
