"""Pictures larger than the tokenizer's resolution, in overlapping tiles of exactly that resolution.

Codes cannot be averaged: each comes from the tile in which it lies farthest from a border. Decoded pixels are blended: from
one tile to the next the weight moves linearly, and what lies nearest to a tile's border (where convolutions saw padding
instead of the picture) has weight 0. Tiles as in diffusers' and LlamaGen's VAEs; there latents are blended, here codes are not.

Axes: B batch, H W pixels, h w code positions of the picture, S pixels of a tile's side, d codes a position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenloom_common.errors import UserError


class TileTokenizer(Protocol):
    """What tiling needs of a tokenizer. `depth`, where it exists, says how many codes a position has, side by side in a row."""

    config: Any  # config.resolution: S
    grid: tuple[int, int]

    def encode(self, image: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


class _Axis(NamedTuple):
    """The tiles along one side of a picture, in code positions."""

    length: int  # of the picture
    tile: int
    pixels: int  # of one position
    starts: tuple[int, ...]

    def owned(self) -> list[tuple[int, int]]:
        """For each tile the positions [first, last) that lie farther from its border than from any other tile's."""
        place = torch.arange(self.length)
        start = torch.tensor(self.starts)[:, None]
        distance = torch.minimum(place - start, start + self.tile - 1 - place)  # [tiles, positions], below 0 outside
        owner = distance.argmax(dim=0)  # ties go to the first; never goes back, so that each tile owns one stretch
        ends = torch.searchsorted(owner, torch.arange(len(self.starts)), right=True).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def weights(self) -> Tensor:
        """The share of each tile in each of its pixels, [tiles, S] float32; over a pixel's tiles the shares sum to 1."""
        side = self.tile * self.pixels
        shares = torch.ones(len(self.starts), side, dtype=torch.float64)
        if len(self.starts) > 1:
            narrowest = self.tile - max(b - a for a, b in zip(self.starts[:-1], self.starts[1:], strict=True))
            left = torch.arange(side, dtype=torch.float64) + 0.5 - narrowest * self.pixels / 4  # a quarter counts nothing
            for index in range(len(self.starts)):
                before = left if index > 0 else torch.full_like(left, side)  # the picture's own edge is no seam
                after = left.flip(0) if index < len(self.starts) - 1 else torch.full_like(left, side)
                shares[index] = torch.minimum(before, after).clamp(min=0)
        total = torch.zeros(self.length * self.pixels, dtype=torch.float64)
        spans = [slice(start * self.pixels, start * self.pixels + side) for start in self.starts]
        for share, span in zip(shares, spans, strict=True):
            total[span] += share
        return torch.stack([share / total[span] for share, span in zip(shares, spans, strict=True)]).float()


def _axis(length: int, tile: int, pixels: int, overlap: float) -> _Axis:
    """Tiles spread evenly, each sharing at least `overlap` of its side with the next."""
    stride = max(1, tile - math.ceil(overlap * tile))
    steps = math.ceil((length - tile) / stride)
    return _Axis(length, tile, pixels, tuple(round(i * (length - tile) / steps) for i in range(steps + 1)) if steps else (0,))


class _Tile(NamedTuple):
    picture: int  # index in the batch
    row: int  # index among the tile rows
    column: int
    top: int  # in positions
    left: int


def _groups(batch: int, rows: _Axis, columns: _Axis, size: int) -> Iterator[list[_Tile]]:
    tiles = [_Tile(picture, row, column, top, left) for picture, (row, top), (column, left)
             in product(range(batch), enumerate(rows.starts), enumerate(columns.starts))]
    return (tiles[first:first + size] for first in range(0, len(tiles), size))


class _Layout(NamedTuple):
    """Positions a tile (h, w), pixels a position (h, w), codes a position."""

    tile: tuple[int, int]
    pixels: tuple[int, int]
    depth: int


def _layout(tokenizer: TileTokenizer, overlap: float, batch_size: int) -> _Layout:
    if not 0 <= overlap < 1:
        raise UserError(f"overlap {overlap} is not in [0, 1); it is the share of a tile that the next one repeats: use 0.25")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    side, depth = int(tokenizer.config.resolution), int(getattr(tokenizer, "depth", 1))
    tile = (tokenizer.grid[0], tokenizer.grid[1] // depth)
    return _Layout(tile, (side // tile[0], side // tile[1]), depth)


def _check_size(what: str, size: tuple[int, int], step: tuple[int, int], least: tuple[int, int]) -> None:
    """UserError with the nearest valid size unless both sides are multiples of `step` and at least `least`."""
    valid = tuple(max(low, unit * math.floor(length / unit + 0.5)) for length, unit, low in zip(size, step, least, strict=True))
    if valid != size:
        raise UserError(f"{what} {size[0]} x {size[1]} (height x width) cannot be tiled: the sides must be multiples of "
                        f"{step[0]} x {step[1]} and at least {least[0]} x {least[1]}; use {valid[0]} x {valid[1]}")


@torch.no_grad()
def encode_tiled(tokenizer: TileTokenizer, image: Tensor, overlap: float = 0.25, batch_size: int = 4) -> Tensor:
    """Image [B, 3, H, W] in [-1, 1] -> codes [B, H/f, W/f] int64 ([B, H/f, W/f*d] with d codes a position).

    H and W are multiples of f and at least S. `overlap`: share of a tile's side that the next tile repeats, at least.
    `batch_size`: tiles encoded at a time, which bounds the memory. A picture of one tile is exactly `tokenizer.encode`.
    UserError on another size, overlap or batch_size.
    """
    layout = _layout(tokenizer, overlap, batch_size)
    if image.ndim != 4:
        raise UserError(f"expected an image [B, 3, H, W], got {list(image.shape)}")
    batch, side, depth = len(image), int(tokenizer.config.resolution), layout.depth
    size = (image.shape[2], image.shape[3])
    _check_size("a picture of", size, layout.pixels, (side, side))
    rows, columns = (_axis(size[i] // layout.pixels[i], layout.tile[i], layout.pixels[i], overlap) for i in (0, 1))
    codes = torch.zeros(batch, rows.length, columns.length * depth, dtype=torch.int64, device=image.device)
    row_spans, column_spans = rows.owned(), columns.owned()
    for group in _groups(batch, rows, columns, batch_size):
        cut = [image[tile.picture, :, tile.top * rows.pixels:, tile.left * columns.pixels:][:, :side, :side] for tile in group]
        for tile, found in zip(group, tokenizer.encode(torch.stack(cut)), strict=True):  # found: [h, w*d]
            (first, last), (start, end) = row_spans[tile.row], column_spans[tile.column]
            codes[tile.picture, first:last, start * depth:end * depth] = \
                found[first - tile.top:last - tile.top, (start - tile.left) * depth:(end - tile.left) * depth]
    return codes


@torch.no_grad()
def decode_tiled(tokenizer: TileTokenizer, codes: Tensor, overlap: float = 0.25, batch_size: int = 4) -> Tensor:
    """Codes [B, h, w] in [0, K) ([B, h, w*d] with d codes a position) -> image [B, 3, h*f, w*f] in [-1, 1].

    h and w are at least those of one tile. `overlap` and `batch_size` as in `encode_tiled`. Codes of one tile give exactly
    `tokenizer.decode`. UserError on another size, overlap or batch_size, and on what `tokenizer.decode` refuses.
    """
    layout = _layout(tokenizer, overlap, batch_size)
    depth = layout.depth
    if codes.ndim != 3:
        raise UserError(f"expected codes [B, h, w], got {list(codes.shape)}")
    least = (layout.tile[0], layout.tile[1] * depth)
    _check_size("a grid of codes of", (codes.shape[1], codes.shape[2]), (1, depth), least)
    size = (codes.shape[1], codes.shape[2] // depth)
    rows, columns = (_axis(size[i], layout.tile[i], layout.pixels[i], overlap) for i in (0, 1))
    height, width = rows.length * rows.pixels, columns.length * columns.pixels
    row_weights, column_weights = rows.weights().to(codes.device), columns.weights().to(codes.device)
    image, dtype = torch.zeros(len(codes), 3, height, width, device=codes.device), torch.float32
    for group in _groups(len(codes), rows, columns, batch_size):
        cut = [codes[tile.picture, tile.top:tile.top + rows.tile, tile.left * depth:(tile.left + columns.tile) * depth]
               for tile in group]
        decoded = tokenizer.decode(torch.stack(cut))  # [tiles, 3, S, S]
        dtype = decoded.dtype
        for tile, pixels in zip(group, decoded, strict=True):
            weight = row_weights[tile.row][:, None] * column_weights[tile.column]  # [S, S]
            place = image[tile.picture, :, tile.top * rows.pixels:, tile.left * columns.pixels:]
            place[:, :weight.shape[0], :weight.shape[1]] += weight * pixels
    return image.clamp_(-1.0, 1.0).to(dtype)  # weights that sum to 1 only to rounding could leave the range
