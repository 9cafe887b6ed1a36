"""How much of a codebook is in use, over the latest batches.

Axes: B batch, h w code grid, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Usage(NamedTuple):
    """usage: share of codes seen, in [0, 1]. perplexity: exp(entropy), 1 to K. dead_codes: how many of the K were not seen.
    codes_seen: how many codes were counted."""

    usage: float
    perplexity: float
    dead_codes: int
    codes_seen: int


def usage_of_counts(counts: Tensor) -> Usage:
    """Usage of a codebook whose codes were seen `counts` [K] times. Without any, nothing is in use."""
    size, seen = len(counts), int(counts.sum())
    if not seen:
        return Usage(0.0, 0.0, size, 0)
    used = int((counts > 0).sum())
    shares = counts.double() / seen
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Usage(used / size, float(entropy.exp()), size - used, seen)


class CodebookUsage(nn.Module):
    """Counts codes over the latest updates. Its state is in buffers, so it moves and is saved with a model.

    Memory does not grow with the window: updates share at most `buckets` rows of counts, ceil(window/buckets) each, and the
    oldest row is dropped as a whole. A report covers the latest c updates, window - ceil(window/buckets) < c <= window; with
    a window of at most `buckets` updates that is exactly the window. Fewer than that were all counted.
    """

    counts: Tensor
    position: Tensor

    def __init__(self, codebook_size: int, window: int = 100, buckets: int = 32) -> None:
        super().__init__()
        if min(codebook_size, window, buckets) < 1:
            raise ValueError(f"codebook_size, window and buckets must be 1 or more, got {codebook_size}, {window}, {buckets}")
        self.codebook_size = codebook_size
        self.window = window
        self.updates_per_row = -(-window // buckets)
        rows = -(-window // self.updates_per_row)
        self.register_buffer("counts", torch.zeros(rows, codebook_size, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # updates so far

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Add one batch of codes, any shape, integers in [0, K); what left the window drops out."""
        flat = codes.reshape(-1).to(self.counts.device)
        if len(flat):
            low, high = (int(bound) for bound in torch.aminmax(flat))
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"code {low if low < 0 else high} is outside a codebook of {self.codebook_size}")
        row, before = divmod(int(self.position), self.updates_per_row)
        rows = len(self.counts)
        if before == 0:
            self.counts[row % rows] = 0
        self.counts[row % rows] += torch.bincount(flat, minlength=self.codebook_size)
        full = (self.window - before - 1) // self.updates_per_row  # whole rows that fit into the window beside this one
        if full < rows - 1:
            self.counts[(row - full - 1) % rows] = 0
        self.position += 1

    def counts_total(self) -> Tensor:
        """How often each code was seen [K] int64, for histograms and for sums over processes."""
        return self.counts.sum(dim=0)

    def compute(self) -> Usage:
        """Usage over the window. Before the first update nothing is in use."""
        return usage_of_counts(self.counts_total())
