"""Layouts: a coarse grid of classes that comes before the image tokens (Make-A-Scene, Gafni et al.
2022, https://arxiv.org/abs/2203.13131). Of `classes` that the data carries (a segmentation), or of
the picture's own `colors`.
"""

# Axes: B pictures, L layout tokens (= rows * columns), S side in pixels

from __future__ import annotations

from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from seq2seq import TransformerConfig
from tokenloom_common.errors import UserError

COLOR_LEVELS = 3  # a channel: dark, middle, bright
COLOR_CLASSES = COLOR_LEVELS**3


def color_layout(image: Image.Image, grid: tuple[int, int]) -> numpy.ndarray:
    """A picture's colour layout [L] int64 in [0, 27): each cell's mean colour, each channel to the
    nearest of 0, 128, 255.
    """
    small = numpy.asarray(image.convert("RGB").resize((grid[1], grid[0]), Image.Resampling.BOX), dtype=numpy.float64)
    levels = numpy.rint(small / 255 * (COLOR_LEVELS - 1)).astype(numpy.int64)  # [rows, columns, 3]
    return (levels @ numpy.array([COLOR_LEVELS**2, COLOR_LEVELS, 1])).reshape(-1)


def color_picture(layout: Tensor, grid: tuple[int, int], side: int) -> Image.Image:
    """The other way: a colour layout [L] as a picture of side x side pixels, for people to look at.
    """
    levels = torch.stack([layout // COLOR_LEVELS**2, layout // COLOR_LEVELS % COLOR_LEVELS, layout % COLOR_LEVELS], dim=-1)
    pixels = (levels.reshape(*grid, 3) * 255 // (COLOR_LEVELS - 1)).to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def read_layout(given: Any, config: TransformerConfig, rows: int) -> Tensor | None:
    """What a caller gives as a layout -> [rows, L] int64: a picture (colour layouts), class numbers
    [L] or [rows, columns], or one such for each of the `rows` pictures. None stays None: it is
    sampled. UserError on anything else.
    """
    if given is None:
        return None
    if config.layout_grid is None:
        raise UserError("this model was trained without layouts; leave the layout out")
    if isinstance(given, Image.Image):
        if config.layout_kind != "colors":
            raise UserError(f"this model's layouts are {config.layout_classes} classes, not colours; give their numbers, "
                            f"{config.layout_grid[0]} x {config.layout_grid[1]} of them")
        given = color_layout(given, config.layout_grid)
    try:
        layout = torch.as_tensor(numpy.asarray(given))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"a layout must be a picture or whole numbers, got {type(given).__name__}") from None
    if layout.is_floating_point() or layout.is_complex() or layout.dtype == torch.bool:
        raise UserError(f"a layout holds whole numbers, got {str(layout.dtype).removeprefix('torch.')}")
    count = config.layout_tokens
    if layout.numel() == count:
        layout = layout.reshape(1, count).expand(rows, -1)
    elif layout.numel() == rows * count and len(layout) == rows:
        layout = layout.reshape(rows, count)
    else:
        raise UserError(f"a layout of {tuple(layout.shape)} numbers: this model reads {config.layout_grid[0]} x "
                        f"{config.layout_grid[1]} of them, for all pictures or for each of {rows}")
    if int(layout.min()) < 0 or int(layout.max()) >= (config.layout_classes or 0):
        raise UserError(f"a layout's numbers must lie in 0 to {(config.layout_classes or 0) - 1}, found "
                        f"{int(layout.min())} to {int(layout.max())}")
    return layout.long()
