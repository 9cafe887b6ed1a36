"""Rotary angles from the coordinates of slots: one axis for text, two for the grid of image tokens.

Rotary embeddings: Su et al. 2021, https://arxiv.org/abs/2104.09864. With two axes, half of each
head is rotated by the row, the other half by the column.
"""

# Axes: n slots, a axes (1 or 2), h w grid, d head width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0  # Su et al. 2021, section 3.2.2


def flat_positions(length: int) -> Tensor:
    """[length, 1] float32: 0, 1, 2, ..."""
    return torch.arange(length, dtype=torch.float32)[:, None]


def grid_positions(grid: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """[h*w, 2] float32: (row, column) in raster order.

    scale: cells of a finer grid per cell of this one, for each axis; positions are then the middles
    of the areas covered on the finer grid.
    """
    rows = _axis_positions(grid[0], scale[0])
    columns = _axis_positions(grid[1], scale[1])
    axes = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 2)


def _axis_positions(count: int, scale: float) -> Tensor:
    # the middle of cell i is at i + 0.5; with scale 1 the halves cancel
    middles = torch.arange(count, dtype=torch.float32) + 0.5
    return middles * scale - 0.5


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """positions [n, a] -> angles [1, n, head_dim] float32, an equal part of each head per axis.

    Each angle is repeated for the two halves of its pair.
    """
    part = head_dim // positions.shape[-1]  # numbers of a head for each axis
    exponents = -torch.arange(0, part, 2, dtype=torch.float32) / part
    frequencies = ROTARY_BASE ** exponents  # [part / 2]
    angles = positions[:, :, None] * frequencies  # [n, a, part / 2]
    # pairs are neighbours (0, 1), (2, 3), ..., as in x-transformers
    return angles.repeat_interleave(2, dim=-1).flatten(1)[None]  # [1, n, d]


class AnglesByDevice:
    """Angles, made once per device. Not buffers: casting a model to bfloat16 would round them."""

    def __init__(self) -> None:
        self._made: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, positions: Callable[[], Tensor], head_dim: int) -> Tensor:
        """Return `rotary_angles` of `positions()` on a device."""
        if device not in self._made:
            self._made[device] = rotary_angles(positions(), head_dim).to(device)
        return self._made[device]
