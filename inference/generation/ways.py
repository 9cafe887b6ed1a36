"""Captions -> image tokens, one token after another, with guidance; a layout first, for models that have one."""

# Axes: B pictures, C captions, n pictures a caption, N image tokens, L layout tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Generation, Request


def generate_tokens(decoder: CachedDecoder, request: Request) -> tuple[Tensor, Tensor | None]:
    """All steps -> image_tokens [B, N] int64 in raster order, and the layout [B, L] of models that have one."""
    generation = Generation(decoder, request)
    return torch.stack(list(token_steps(generation)), dim=1), generation.layout


def token_steps(generation: Generation) -> Iterator[Tensor]:
    """Yield the next ids [B] for each of the N positions, in the way that suits request and device; the tokens are the same."""
    from inference.generation.cuda_graph import static_steps
    from inference.generation.jacobi import jacobi_steps

    if generation.request.window > 1:
        return jacobi_steps(generation)
    return static_steps(generation) if generation.decoder.device.type == "cuda" else generation.steps()
