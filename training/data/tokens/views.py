"""Views of a picture: as it is, its corners, and each mirrored. What encode_dataset encodes of one picture."""

# Axes: V views, S side in pixels, h w layout grid

from __future__ import annotations

import numpy
from PIL import Image

from tokenizer_image.images import image_to_pixels
from training.config.encoding import ViewsConfig

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
MIRRORED = " mirrored"


def view_names(config: ViewsConfig) -> list[str]:
    """'plain', then what the config adds, in the order of `picture_views`."""
    names = ["plain", *(CORNERS if config.corners else ())]
    return [*names, *(f"{name}{MIRRORED}" for name in names)] if config.flip else names


def picture_views(image: Image.Image, size: int, config: ViewsConfig) -> numpy.ndarray:
    """An RGB picture -> [V, S, S, 3] uint8: its centre square, and from the same square what the config adds.

    Corners are cut from the square enlarged by `config.enlarged`, as LlamaGen's ten crops are (Sun et al. 2024, extract_codes),
    but resampled once, from the picture itself.
    """
    views = [image_to_pixels(image, size)]
    if config.corners:
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        cut = side / config.enlarged
        for down in (0.0, side - cut):
            for right in (0.0, side - cut):
                box = (left + right, top + down, left + right + cut, top + down + cut)
                views.append(numpy.array(image.resize((size, size), Image.Resampling.LANCZOS, box=box).convert("RGB")))
    if config.flip:
        views += [view[:, ::-1] for view in views]
    return numpy.stack(views)


def mirrored(layout: numpy.ndarray, grid: tuple[int, int]) -> numpy.ndarray:
    """A layout [h * w] with left and right exchanged."""
    return layout.reshape(grid)[:, ::-1].reshape(-1)
