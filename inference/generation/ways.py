"""Captions -> image tokens: choose how to decode (plain, Jacobi, CUDA graph) and run it.

A layout comes first, if there is one.
"""

# Axes: B images, N image tokens, L layout tokens

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Generation, Request
from inference.generation.cuda_graph import static_steps
from inference.generation.jacobi import jacobi_steps


def generate_tokens(decoder: CachedDecoder, request: Request) -> tuple[Tensor, Tensor | None]:
    """Run all steps -> image_tokens [B, N] int64 in raster order, layout [B, L] if there is one."""
    generation = Generation(decoder, request)
    # the list before `layout`, which is known only once the steps have run
    return torch.stack(list(token_steps(generation)), dim=1), generation.layout


def token_steps(generation: Generation) -> Iterator[Tensor]:
    """Yield the next ids [B] for each of the N positions, the same however they are decoded."""
    if generation.request.window > 1:
        return jacobi_steps(generation)
    if generation.decoder.device.type == "cuda":
        return static_steps(generation)
    return generation.steps()
