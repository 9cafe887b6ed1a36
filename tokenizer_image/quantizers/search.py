"""Exhaustive code search in blocks, so that memory does not grow with the codebook.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size, n latents of a batch (=
B*h*w).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

MAX_SCORES_PER_BLOCK = 1 << 22  # 16 MiB of float32
MIN_CODES_PER_BLOCK = 4096


def nearest_codes(latents: Tensor, codebook: Tensor, unit_length: bool) -> Tensor:
    """Latents [B, D, h, w] and code vectors [K, D] -> the nearest code of each latent [B, h, w]
    int64.

    Ties go to the lowest code. unit_length: the code vectors have length 1, so the largest product
    is the nearest.
    """
    if unit_length:
        return argmax_scores(latents, codebook)

    # argmin |z - e|^2 = argmax 2 z.e - |e|^2, since |z|^2 is the same for every code
    offsets = codebook.square().sum(dim=1).neg()
    return argmax_scores(latents, codebook, offsets, scale=2)


def argmax_scores(latents: Tensor, rows: Tensor, offsets: Tensor | None = None,
                  scale: float = 1) -> Tensor:
    """Return argmax over k of scale * (latent . rows[k]) + offsets[k], the lowest k on ties.

    Latents [B, D, h, w], rows [K, D], offsets [K] -> [B, h, w] int64. `scale` is read only with
    offsets.
    """
    batch, _, height, width = latents.shape
    flat = rearrange(latents, "b d h w -> (b h w) d")  # [n, D]

    min_codes = min(len(rows), MIN_CODES_PER_BLOCK)
    latents_per_block = max(1, min(len(flat), MAX_SCORES_PER_BLOCK // min_codes))
    codes_per_block = max(1, MAX_SCORES_PER_BLOCK // latents_per_block)

    found = []
    for block in flat.split(latents_per_block):
        best_score = block.new_full((len(block),), -torch.inf)
        best_code = block.new_zeros(len(block), dtype=torch.int64)

        for first in range(0, len(rows), codes_per_block):
            codes = slice(first, first + codes_per_block)
            if offsets is None:
                scores = block @ rows[codes].T  # [latents, codes]
            else:
                scores = torch.addmm(offsets[codes], block, rows[codes].T, alpha=scale)

            score, index = scores.max(dim=1)
            better = score > best_score  # strictly greater: a tie stays with the lower code
            best_score = torch.where(better, score, best_score)
            best_code = torch.where(better, index + first, best_code)
        found.append(best_code)
    return torch.cat(found).reshape(batch, height, width)
