"""Images larger than the tokenizer's resolution, in overlapping tiles of exactly that resolution.

Codes cannot be averaged: each comes from the tile in which it lies farthest from a border. Decoded
pixels are blended: from one tile to the next the weight moves linearly, and the pixels nearest to a
tile's border, where convolutions saw padding instead of the image, have weight 0. Tiles as in
diffusers' and LlamaGen's VAEs; those blend latents, here codes are not blended.

Axes: B batch, H W pixels, h w code positions of the image, S pixels of a tile's side, d codes per
position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenloom_common.errors import UserError


class TileTokenizer(Protocol):
    """The part of a tokenizer that tiling uses.

    An optional `depth` says how many codes a position has, adjacent in a row.
    """

    config: Any  # config.resolution: S
    grid: tuple[int, int]

    def encode(self, image: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


@torch.no_grad()
def encode_tiled(tokenizer: TileTokenizer, image: Tensor, overlap: float = 0.25,
                 batch_size: int = 4) -> Tensor:
    """Image [B, 3, H, W] in [-1, 1] -> codes [B, H/f, W/f] int64, or [B, H/f, W/f*d].

    H and W are multiples of f and at least S. `overlap`: share of a tile's side that the next tile
    repeats, at least. `batch_size`: tiles encoded at a time, which bounds the memory. An image of
    one tile is exactly `tokenizer.encode`. UserError on another size, overlap or batch_size.
    """
    geometry = _tile_geometry(tokenizer, overlap, batch_size)
    if image.ndim != 4:
        raise UserError(f"expected an image [B, 3, H, W], got {list(image.shape)}")
    batch, _, height, width = image.shape
    side = int(tokenizer.config.resolution)
    _check_size("a picture of", (height, width), geometry.pixels, (side, side))

    cell_height, cell_width = geometry.pixels
    rows, columns = _tile_axes(geometry, height // cell_height, width // cell_width, overlap)
    row_spans = rows.owned_spans()
    column_spans = columns.owned_spans()
    codes = torch.zeros(batch, rows.length, columns.length, geometry.depth, dtype=torch.int64,
                        device=image.device)

    for tiles in _tile_batches(batch, rows, columns, batch_size):
        crops = [image[tile.image, :, rows.pixels_of(tile.row), columns.pixels_of(tile.column)]
                 for tile in tiles]
        encoded = tokenizer.encode(torch.stack(crops))  # [tiles, h, w*d]
        encoded = encoded.unflatten(2, (-1, geometry.depth))  # [tiles, h, w, d]

        for tile, tile_codes in zip(tiles, encoded, strict=True):
            row = row_spans[tile.row]
            column = column_spans[tile.column]
            owned = tile_codes[row.in_tile, column.in_tile]
            codes[tile.image, row.in_image, column.in_image] = owned
    return codes.flatten(2)


@torch.no_grad()
def decode_tiled(tokenizer: TileTokenizer, codes: Tensor, overlap: float = 0.25,
                 batch_size: int = 4) -> Tensor:
    """Codes [B, h, w] or [B, h, w*d] in [0, K) -> image [B, 3, h*f, w*f] in [-1, 1].

    h and w are at least those of one tile. `overlap` and `batch_size` as in `encode_tiled`. Codes
    of one tile give exactly `tokenizer.decode`. UserError on another size, overlap or batch_size,
    and on codes that `tokenizer.decode` refuses.
    """
    geometry = _tile_geometry(tokenizer, overlap, batch_size)
    if codes.ndim != 3:
        raise UserError(f"expected codes [B, h, w], got {list(codes.shape)}")
    batch, height, width = codes.shape
    depth = geometry.depth
    least = (geometry.tile[0], geometry.tile[1] * depth)
    _check_size("a grid of codes of", (height, width), (1, depth), least)

    rows, columns = _tile_axes(geometry, height, width // depth, overlap)
    row_weights = rows.blend_weights().to(codes.device)
    column_weights = columns.blend_weights().to(codes.device)
    positions = codes.unflatten(2, (-1, depth))  # [B, h, w, d]
    image = torch.zeros(batch, 3, rows.length * rows.pixels, columns.length * columns.pixels,
                        device=codes.device)
    dtype = image.dtype

    for tiles in _tile_batches(batch, rows, columns, batch_size):
        crops = []
        for tile in tiles:
            row = rows.positions_of(tile.row)
            column = columns.positions_of(tile.column)
            crops.append(positions[tile.image, row, column])
        decoded = tokenizer.decode(torch.stack(crops).flatten(2))  # [tiles, 3, S, S]
        dtype = decoded.dtype

        for tile, pixels in zip(tiles, decoded, strict=True):
            weight = row_weights[tile.row][:, None] * column_weights[tile.column]  # [S, S]
            row = rows.pixels_of(tile.row)
            column = columns.pixels_of(tile.column)
            image[tile.image, :, row, column] += weight * pixels

    # weights that sum to 1 only up to rounding could leave the range
    return image.clamp_(-1.0, 1.0).to(dtype)


class _OwnedSpan(NamedTuple):
    """Positions whose codes come from one tile, as seen from the image and from the tile."""

    in_image: slice
    in_tile: slice


class _TileAxis(NamedTuple):
    """The tiles along one side of an image, in code positions."""

    length: int  # of the image
    tile: int
    pixels: int  # per position
    starts: tuple[int, ...]

    def positions_of(self, index: int) -> slice:
        """Positions of the image under a tile."""
        start = self.starts[index]
        return slice(start, start + self.tile)

    def pixels_of(self, index: int) -> slice:
        """Pixels of the image under a tile."""
        first = self.starts[index] * self.pixels
        return slice(first, first + self.tile * self.pixels)

    def owned_spans(self) -> list[_OwnedSpan]:
        """For each tile, the positions that lie farther from its border than from any other's."""
        position = torch.arange(self.length)
        start = torch.tensor(self.starts)[:, None]
        last = start + self.tile - 1
        distance = torch.minimum(position - start, last - position)  # [tiles, h], < 0 outside

        # ties go to the first tile; owners ascend along the axis, so that each owns one span
        owner = distance.argmax(dim=0)
        tiles = torch.arange(len(self.starts))
        ends = torch.searchsorted(owner, tiles, right=True).tolist()

        spans = []
        first = 0
        for tile_start, end in zip(self.starts, ends, strict=True):
            in_tile = slice(first - tile_start, end - tile_start)
            spans.append(_OwnedSpan(slice(first, end), in_tile))
            first = end
        return spans

    def blend_weights(self) -> Tensor:
        """Weight of each tile in each of its pixels, [tiles, S] float32; a pixel's sum to 1."""
        count = len(self.starts)
        side = self.tile * self.pixels
        weights = torch.ones(count, side, dtype=torch.float64)
        if count > 1:
            widest_step = max(after - before for before, after in pairwise(self.starts))
            narrowest_overlap = (self.tile - widest_step) * self.pixels
            margin = narrowest_overlap / 4  # at either border this much has weight 0
            ramp = torch.arange(side, dtype=torch.float64) + 0.5 - margin
            no_ramp = torch.full_like(ramp, side)  # the image's own edge is no seam
            for index in range(count):
                from_start = ramp if index > 0 else no_ramp
                to_end = ramp.flip(0) if index < count - 1 else no_ramp
                weights[index] = torch.minimum(from_start, to_end).clamp(min=0)

        total = torch.zeros(self.length * self.pixels, dtype=torch.float64)
        spans = [self.pixels_of(index) for index in range(count)]
        for weight, span in zip(weights, spans, strict=True):
            total[span] += weight
        shares = [weight / total[span] for weight, span in zip(weights, spans, strict=True)]
        return torch.stack(shares).float()


class _Geometry(NamedTuple):
    """Sizes of one tile."""

    tile: tuple[int, int]  # positions per tile (h, w)
    pixels: tuple[int, int]  # pixels per position (h, w)
    depth: int  # codes per position


def _tile_geometry(tokenizer: TileTokenizer, overlap: float, batch_size: int) -> _Geometry:
    if not 0 <= overlap < 1:
        raise UserError(f"overlap {overlap} is not in [0, 1); it is the share of a tile that the "
                        "next one repeats: use 0.25")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} must be at least 1")
    side = int(tokenizer.config.resolution)
    depth = int(getattr(tokenizer, "depth", 1))
    height, width = tokenizer.grid[0], tokenizer.grid[1] // depth
    return _Geometry((height, width), (side // height, side // width), depth)


def _tile_axes(geometry: _Geometry, height: int, width: int,
               overlap: float) -> tuple[_TileAxis, _TileAxis]:
    """Tile rows and tile columns of an image of height x width positions."""
    tile_height, tile_width = geometry.tile
    cell_height, cell_width = geometry.pixels
    rows = _TileAxis(height, tile_height, cell_height, _tile_starts(height, tile_height, overlap))
    columns = _TileAxis(width, tile_width, cell_width, _tile_starts(width, tile_width, overlap))
    return rows, columns


def _tile_starts(length: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Spread tiles evenly, each sharing at least `overlap` of its side with the next."""
    max_stride = max(1, tile - math.ceil(overlap * tile))
    last_start = length - tile
    steps = math.ceil(last_start / max_stride)
    if not steps:
        return (0,)
    return tuple(round(index * last_start / steps) for index in range(steps + 1))


class _Tile(NamedTuple):
    """Index in the batch, among the tile rows, and among the tile columns."""

    image: int
    row: int
    column: int


def _tile_batches(batch: int, rows: _TileAxis, columns: _TileAxis,
                  size: int) -> Iterator[list[_Tile]]:
    """Yield the tiles of all images, `size` at a time."""
    indices = product(range(batch), range(len(rows.starts)), range(len(columns.starts)))
    tiles = [_Tile(*index) for index in indices]
    for first in range(0, len(tiles), size):
        yield tiles[first:first + size]


def _check_size(what: str, size: tuple[int, int], step: tuple[int, int],
                least: tuple[int, int]) -> None:
    """Raise UserError unless both sides are multiples of `step` and at least `least`."""
    valid = []
    for length, unit, low in zip(size, step, least, strict=True):
        nearest = unit * math.floor(length / unit + 0.5)  # round() sends halves to the even side
        valid.append(max(low, nearest))
    if tuple(valid) != size:
        height, width = valid
        raise UserError(
            f"{what} {size[0]} x {size[1]} (height x width) cannot be tiled: the sides must be "
            f"multiples of {step[0]} x {step[1]} and at least {least[0]} x {least[1]}; "
            f"use {height} x {width}")
