"""The layout of a picture as token shards keep it: classes from a column of the data, or the picture's own colours."""

# Axes: L layout tokens

from __future__ import annotations

import math

import numpy
from PIL import Image

from inference.layouts import COLOR_CLASSES, color_layout
from tokenloom_common.errors import DataError
from training.config.encoding import LayoutConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.tokens.shards import LayoutIndex
from training.data.tokens.views import mirrored


class Layouts:
    """Makes layouts [L] uint16 as the config says."""

    def __init__(self, config: LayoutConfig) -> None:
        self.config = config

    def index(self) -> LayoutIndex:
        """What tokens.json says of them."""
        if self.config.kind == "colors":
            return LayoutIndex(kind="colors", classes=COLOR_CLASSES, grid=self.config.grid)
        return LayoutIndex(kind="classes", classes=self.config.classes or 0, grid=self.config.grid)

    def of_views(self, source: CaptionedImages, row: int, views: numpy.ndarray, mirror: bool) -> numpy.ndarray:
        """The layouts [V, L] of a picture's views [V, S, S, 3], the second half of which are mirrored where `mirror`."""
        if self.config.kind == "colors":
            return numpy.stack([self.of(source, row, view) for view in views])
        one = self.of(source, row, views[0])
        return numpy.stack([one, mirrored(one, self.config.grid)] if mirror else [one])

    def of(self, source: CaptionedImages, row: int, pixels: numpy.ndarray) -> numpy.ndarray:
        """The layout of a row whose square picture is `pixels` [S, S, 3] uint8. DataError for a row without usable classes."""
        if self.config.kind == "colors":
            return color_layout(Image.fromarray(pixels), self.config.grid).astype(numpy.uint16)
        values = source.metadata(row).get(self.config.column)
        if values is None:
            raise DataError(f"{source.path}: row {source.key(row)} has no column '{self.config.column}' for its layout "
                            f"(layout.column; columns: {', '.join(source.columns)})")
        return coarser(numpy.asarray(values), self.config.grid, self.config.classes or 0, source.key(row))


def coarser(values: numpy.ndarray, grid: tuple[int, int], classes: int, key: str) -> numpy.ndarray:
    """Classes of a square grid in raster order -> the class in the middle of each of `grid`'s cells, [L] uint16."""
    side = math.isqrt(values.size)
    if values.dtype.kind not in "iu" or side * side != values.size or side == 0:
        raise DataError(f"row {key}: a layout must be whole numbers on a square grid, got {values.size} of {values.dtype}")
    if values.min() < 0 or values.max() >= classes:
        raise DataError(f"row {key}: layout classes {values.min()} to {values.max()} do not lie in 0 to {classes - 1} "
                        "(layout.classes)")
    rows, columns = (((numpy.arange(count) + 0.5) * side / count).astype(int) for count in grid)
    return values.reshape(side, side)[numpy.ix_(rows, columns)].reshape(-1).astype(numpy.uint16)
