"""Fold a grid of codes into a sequence of image tokens and back, in raster order.

The only place that does: the order of image tokens is decided here.

Axes: B batch, h w code grid, N image tokens (= h*w).
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def codes_to_tokens(codes: Tensor) -> Tensor:
    """Codes [B, h, w] -> image_tokens [B, N], row by row. ValueError on another shape."""
    if codes.ndim != 3:
        raise ValueError(f"expected codes [B, h, w], got {list(codes.shape)}")
    return rearrange(codes, "b h w -> b (h w)")


def tokens_to_codes(image_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """image_tokens [B, N] -> codes [B, h, w]. ValueError unless N = h*w."""
    height, width = grid
    count = height * width
    if image_tokens.ndim != 2 or image_tokens.shape[1] != count:
        raise ValueError(f"expected image_tokens [B, {count}] for a grid of {height} x {width}, "
                         f"got {list(image_tokens.shape)}")
    return rearrange(image_tokens, "b (h w) -> b h w", h=height, w=width)
