"""Augmented views of an image, which encode_dataset encodes.

They are the image itself, its four corners, and each of these mirrored.
"""

# Axes: V views, S side in pixels, h w layout grid

from __future__ import annotations

import numpy
from PIL import Image

from tokenizer_image.images import image_to_pixels
from training.config.encoding import ViewsConfig

CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


def view_names(config: ViewsConfig) -> list[str]:
    """Return 'plain' and the names of the further views, in the order of `image_views`."""
    names = ["plain"]
    if config.corners:
        names += CORNERS
    if config.flip:  # last, so that the second half of all views is the mirrored one
        names += [f"{name} mirrored" for name in names]
    return names


def image_views(image: Image.Image, size: int, config: ViewsConfig) -> numpy.ndarray:
    """Cut an RGB image into its views [V, S, S, 3] uint8, all from its centre square."""
    views = [image_to_pixels(image, size)]
    if config.corners:
        views += _corner_views(image, size, config.enlarged)
    if config.flip:
        views += [view[:, ::-1] for view in views]
    return numpy.stack(views)


def _corner_views(image: Image.Image, size: int, enlarged: float) -> list[numpy.ndarray]:
    """Cut the corners [S, S, 3] out of the centre square, enlarged, in the order of CORNERS.

    As in LlamaGen's ten crops (Sun et al. 2024, extract_codes), but resampled once, from the image
    itself.
    """
    side = min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    # cutting a smaller box and resizing it to S enlarges and crops in one step
    cut = side / enlarged
    offsets = (0.0, side - cut)

    views = []
    for down in offsets:
        for right in offsets:
            box = (left + right, top + down, left + right + cut, top + down + cut)
            view = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
            views.append(numpy.array(view.convert("RGB")))
    return views


def mirrored(layout: numpy.ndarray, grid: tuple[int, int]) -> numpy.ndarray:
    """Exchange left and right of a layout [h * w]."""
    return layout.reshape(grid)[:, ::-1].reshape(-1)
