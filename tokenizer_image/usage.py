"""How much of a codebook is in use, over the latest batches.

Axes: B batch, h w code grid, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Usage(NamedTuple):
    """usage: share of codes seen, in [0, 1]. perplexity: exp(entropy), 1 to K. dead_codes: how many were not seen."""

    usage: float
    perplexity: float
    dead_codes: int


class CodebookUsage(nn.Module):
    """Counts codes over the last `window` updates. Its state is in buffers, so it moves and is saved with a model."""

    counts: Tensor
    position: Tensor

    def __init__(self, codebook_size: int, window: int = 100) -> None:
        super().__init__()
        if codebook_size < 1 or window < 1:
            raise ValueError(f"codebook_size and window must be 1 or more, got {codebook_size} and {window}")
        self.codebook_size = codebook_size
        self.window = window
        self.register_buffer("counts", torch.zeros(window, codebook_size, dtype=torch.int32))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Add one batch of codes, any shape, integers in [0, K); the oldest batch of a full window drops out."""
        counted = torch.bincount(codes.reshape(-1).to(self.counts.device), minlength=self.codebook_size)
        if len(counted) > self.codebook_size:
            raise ValueError(f"code {len(counted) - 1} is outside a codebook of {self.codebook_size}")
        self.counts[self.position % self.window] = counted.to(torch.int32)
        self.position += 1

    def compute(self) -> Usage:
        """Usage over the window. Before the first update nothing is in use."""
        total = self.counts.sum(dim=0, dtype=torch.float64)  # [K]
        if not total.any():
            return Usage(0.0, 0.0, self.codebook_size)
        used = int((total > 0).sum())
        shares = total / total.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        return Usage(used / self.codebook_size, float(entropy.exp()), self.codebook_size - used)
