"""Share of the codebook in use, over the latest batches.

Axes: B batch, h w code grid, K codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizer_image.image_tokenizer import code_out_of_range


class Usage(NamedTuple):
    """Statistics of how often each of the K codes was seen."""

    usage: float
    """Share of codes seen at all, in [0, 1]."""
    perplexity: float
    """exp(entropy) of the code distribution, 1 to K."""
    dead_codes: int
    """Number of codes not seen."""
    codes_seen: int
    """Number of codes counted."""


def usage_of_counts(counts: Tensor) -> Usage:
    """Return the usage of a codebook whose codes were seen `counts` [K] times."""
    size = len(counts)
    seen = int(counts.sum())
    if not seen:
        return Usage(0.0, 0.0, size, 0)

    used = int((counts > 0).sum())
    shares = counts.double() / seen
    entropy = -torch.special.xlogy(shares, shares).sum()  # xlogy: 0 log 0 = 0
    return Usage(used / size, float(entropy.exp()), size - used, seen)


class CodebookUsage(nn.Module):
    """Counts codes over the latest updates. Its state is in buffers, saved with the model.

    Memory does not grow with the window: at most `buckets` rows of counts form a ring, each shared
    by ceil(window/buckets) updates, and the oldest row is dropped as a whole. So a report covers
    the latest c updates, window - ceil(window/buckets) < c <= window: exactly the window if it has
    at most `buckets` updates.
    """

    counts: Tensor
    position: Tensor

    def __init__(self, codebook_size: int, window: int = 100, buckets: int = 32) -> None:
        super().__init__()
        if min(codebook_size, window, buckets) < 1:
            raise ValueError("codebook_size, window and buckets must be 1 or more, "
                             f"got {codebook_size}, {window}, {buckets}")
        self.codebook_size = codebook_size
        self.window = window
        self.updates_per_row = -(-window // buckets)  # rounded up, like rows
        rows = -(-window // self.updates_per_row)
        self.register_buffer("counts", torch.zeros(rows, codebook_size, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # updates so far

    @torch.no_grad()
    def update(self, codes: Tensor) -> None:
        """Add one batch of codes in [0, K), of any shape; what left the window drops out."""
        flat = codes.reshape(-1).to(self.counts.device)
        code = code_out_of_range(flat, self.codebook_size)
        if code is not None:
            raise ValueError(f"code {code} is outside a codebook of {self.codebook_size}")

        rows = len(self.counts)
        row, updates_in_row = divmod(int(self.position), self.updates_per_row)
        if updates_in_row == 0:  # the ring came round to this row
            self.counts[row % rows] = 0
        self.counts[row % rows] += torch.bincount(flat, minlength=self.codebook_size)

        # Whole rows that fit into the window beside this one. The row before them is partly
        # outside, so it goes.
        whole_rows = (self.window - updates_in_row - 1) // self.updates_per_row
        if whole_rows < rows - 1:
            self.counts[(row - whole_rows - 1) % rows] = 0
        self.position += 1

    def counts_total(self) -> Tensor:
        """Return how often each code was seen [K] int64, for histograms and sums over processes."""
        return self.counts.sum(dim=0)

    def compute(self) -> Usage:
        """Return the usage over the window; all zeros before the first update."""
        return usage_of_counts(self.counts_total())
