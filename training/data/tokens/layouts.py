"""Layouts of images for token shards: classes from a column of the data, or the image's colours."""

# Axes: V views, S side in pixels, L layout tokens (= rows * columns of the layout's grid)

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
    """Makes the layouts of images as the config says."""

    def __init__(self, config: LayoutConfig) -> None:
        self.config = config

    def index(self) -> LayoutIndex:
        """Return the entry of tokens.json."""
        if self.config.kind == "colors":
            return LayoutIndex(kind="colors", classes=COLOR_CLASSES, grid=self.config.grid)
        # `or 0` for the type checker: the config demands the number for this kind
        return LayoutIndex(kind="classes", classes=self.config.classes or 0, grid=self.config.grid)

    def view_layouts(self, source: CaptionedImages, row: int, views: numpy.ndarray,
                     mirror: bool) -> numpy.ndarray:
        """Make the layouts [V, L] uint16 of a row's views [V, S, S, 3].

        mirror: the second half of the views are mirrored.
        """
        if self.config.kind == "colors":
            # corners show other colours than the whole image
            return numpy.stack([self.image_layout(source, row, view) for view in views])

        # classes describe the whole image, so the config allows no views but plain and mirrored
        layouts = [self.image_layout(source, row, views[0])]
        if mirror:
            layouts.append(mirrored(layouts[0], self.config.grid))
        return numpy.stack(layouts)

    def image_layout(self, source: CaptionedImages, row: int,
                     pixels: numpy.ndarray) -> numpy.ndarray:
        """Make the layout [L] uint16 of a row whose square image is `pixels` [S, S, 3] uint8.

        DataError for a row without usable classes.
        """
        config = self.config
        if config.kind == "colors":
            return color_layout(Image.fromarray(pixels), config.grid).astype(numpy.uint16)

        classes = source.metadata(row).get(config.column)
        key = source.key(row)
        if classes is None:
            raise DataError(f"{source.path}: row {key} has no column '{config.column}' for its "
                            f"layout (layout.column; columns: {', '.join(source.columns)})")
        return downsample_classes(numpy.asarray(classes), config.grid, config.classes or 0, key)


def downsample_classes(values: numpy.ndarray, grid: tuple[int, int], classes: int,
                       key: str) -> numpy.ndarray:
    """Downsample classes on a square grid, in raster order, to the cells of `grid`: [L] uint16.

    Each cell takes the class at its centre, since classes have no mean. DataError naming the row
    `key` for impossible classes.
    """
    side = math.isqrt(values.size)
    is_square = side > 0 and side * side == values.size
    if values.dtype.kind not in "iu" or not is_square:
        raise DataError(f"row {key}: a layout must be whole numbers on a square grid, got "
                        f"{values.size} of {values.dtype}")
    if values.min() < 0 or values.max() >= classes:
        raise DataError(f"row {key}: layout classes {values.min()} to {values.max()} do not lie in "
                        f"0 to {classes - 1} (layout.classes)")

    rows, columns = (_cell_centres(count, side) for count in grid)
    cells = values.reshape(side, side)[numpy.ix_(rows, columns)]
    return cells.reshape(-1).astype(numpy.uint16)  # the config allows at most 1 << 16 classes


def _cell_centres(count: int, side: int) -> numpy.ndarray:
    """Index, of `side`, at the centre of each of `count` equal cells."""
    centres = (numpy.arange(count) + 0.5) * side / count
    return centres.astype(int)
