"""Rotary angles of slots from their coordinates: one axis for text, two for the grid of image tokens.

Rotary embeddings: Su et al. 2021, https://arxiv.org/abs/2104.09864. Two axes: half of each head turns with the row,
the other half with the column.
"""

# Axes: n slots, a axes (1 or 2), h w grid, d head width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0


def flat_positions(length: int) -> Tensor:
    """[length, 1] float32: 0, 1, 2, ..."""
    return torch.arange(length, dtype=torch.float32)[:, None]


def grid_positions(grid: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """[h*w, 2] float32 (row, column) in raster order. With a scale, cells of a coarser grid: the middle of what each covers."""
    rows, columns = (((torch.arange(count, dtype=torch.float32) + 0.5) * factor - 0.5)
                     for count, factor in zip(grid, scale, strict=True))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """positions [n, a] -> angles [1, n, head_dim] float32: an equal part of each head an axis; each angle stands twice, for
    the two parts of its pair."""
    part = head_dim // positions.shape[-1]
    frequency = ROTARY_BASE ** (-torch.arange(0, part, 2, dtype=torch.float32) / part)  # [part / 2]
    angles = positions[:, :, None] * frequency  # [n, a, part / 2]
    return angles.repeat_interleave(2, dim=-1).flatten(1)[None]  # [1, n, d]


class AnglesByDevice:
    """Angles, made once a device. Not buffers: casting a model to bfloat16 would round them too."""

    def __init__(self) -> None:
        self._made: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, positions: Callable[[], Tensor], head_dim: int) -> Tensor:
        """`rotary_angles` of `positions()` on a device."""
        if device not in self._made:
            self._made[device] = rotary_angles(positions(), head_dim).to(device)
        return self._made[device]


def apply_rotary(heads: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (0,1), (2,3), ... of heads [B, heads, n, d] by angles [1, n, d]; the same map as x-transformers'."""
    first, second = heads[..., 0::2], heads[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (heads * angles.cos() + turned * angles.sin()).type(heads.dtype)
