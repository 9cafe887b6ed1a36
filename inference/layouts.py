"""Layouts: a coarse grid of classes that precedes the image tokens.

The classes come with the data (a segmentation), or are the image's own colours. After Make-A-Scene
(Gafni et al. 2022, https://arxiv.org/abs/2203.13131).
"""

# Axes: B images, L layout tokens (= rows * columns), S side in pixels

from __future__ import annotations

from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from seq2seq import TransformerConfig
from tokenloom_common.errors import UserError

COLOR_LEVELS = 3  # per channel: dark, middle, bright
COLOR_CLASSES = COLOR_LEVELS**3


def color_layout(image: Image.Image, grid: tuple[int, int]) -> numpy.ndarray:
    """Return an image's colour layout [L] int64 in [0, 27).

    Each cell has its mean colour, each channel rounded to the nearest of 0, 128, 255.
    """
    rows, columns = grid
    # BOX averages all pixels of a cell; other filters also look at its neighbours
    cells = image.convert("RGB").resize((columns, rows), Image.Resampling.BOX)
    means = numpy.asarray(cells, dtype=numpy.float64)
    levels = numpy.rint(means / 255 * (COLOR_LEVELS - 1)).astype(numpy.int64)  # [rows, columns, 3]
    # red, green and blue are the digits of a number in base COLOR_LEVELS
    place_values = numpy.array([COLOR_LEVELS**2, COLOR_LEVELS, 1])
    return (levels @ place_values).reshape(-1)


def read_layout(given: Any, config: TransformerConfig, rows: int) -> Tensor | None:
    """Convert a caller's layout to [rows, L] int64, one for each of `rows` images.

    given: an image (for colour layouts), class numbers [L] or [rows, columns], or one of these for
    each image. None stays None: the layout is sampled. UserError for anything else.
    """
    if given is None:
        return None
    if config.layout_grid is None:
        raise UserError("this model was trained without layouts; leave the layout out")
    grid = f"{config.layout_grid[0]} x {config.layout_grid[1]}"
    if isinstance(given, Image.Image):
        if config.layout_kind != "colors":
            classes = config.layout_classes
            raise UserError(f"this model's layouts are {classes} classes, not colours; "
                            f"give their numbers, {grid} of them")
        given = color_layout(given, config.layout_grid)

    try:
        layout = torch.as_tensor(numpy.asarray(given))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"a layout must be a picture or whole numbers, got {type(given).__name__}") from None
    if layout.is_floating_point() or layout.is_complex() or layout.dtype == torch.bool:
        dtype = str(layout.dtype).removeprefix("torch.")
        raise UserError(f"a layout holds whole numbers, got {dtype}")

    count = config.layout_tokens
    if layout.numel() == count:
        layout = layout.reshape(1, count).expand(rows, -1)  # the same for all images
    elif layout.numel() == rows * count and len(layout) == rows:
        layout = layout.reshape(rows, count)
    else:
        raise UserError(f"a layout of {tuple(layout.shape)} numbers: this model reads {grid} of "
                        f"them, for all pictures or for each of {rows}")

    lowest, highest = int(layout.min()), int(layout.max())
    limit = (config.layout_classes or 0) - 1
    if lowest < 0 or highest > limit:
        raise UserError(f"a layout's numbers must lie in 0 to {limit}, found {lowest} to {highest}")
    return layout.long()
