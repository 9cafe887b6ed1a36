"""Rotary angles for text (one axis) and for the raster of image tokens (two axes).

Rotary embeddings: Su et al. 2021, https://arxiv.org/abs/2104.09864. Two axes: half of each head turns with the row,
the other half with the column. Slot i of the decoder predicts token i, so slot i has the position of token i.
"""

# Axes: N image tokens, T text ids, d head width

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0


def rotary_angles_1d(length: int, head_dim: int) -> Tensor:
    """Angles [1, length, head_dim] float32; each angle stands twice, for the two parts of its pair."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [d/2]
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequency[None, :]  # [length, d/2]
    return angles.repeat_interleave(2, dim=-1)[None]  # [1, length, d]


def rotary_angles_2d(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Angles [1, h*w, head_dim] float32 in raster order: the first half of a head by row, the second by column."""
    height, width = grid
    rows = rotary_angles_1d(height, head_dim // 2)[0]  # [h, d/2]
    columns = rotary_angles_1d(width, head_dim // 2)[0]  # [w, d/2]
    rows = rows[:, None, :].expand(height, width, -1)
    columns = columns[None, :, :].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, height * width, head_dim)


def apply_rotary(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (0,1), (2,3), ... of heads [B, heads, n, d] by angles [1, n, d]; the same map as x-transformers'."""
    first, second = heads[..., 0::2], heads[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (heads * angles.cos() + turned * angles.sin()).type(heads.dtype)
