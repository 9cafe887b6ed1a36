"""Outlines of shapes on a grid that does not depend on place and size, and the nearest shape."""

# Axes: S side of the image, T templates, G side of a template's grid

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from training.data.builders.scenes import COLORS, SHAPES, Scene, Thing, draw_scene

GRID_SIDE = 24
GRID_REACH = 1.1  # from the centre, in units of the square root of a thing's area
BLURS = (0.05, 0.1, 0.15, 0.2, 0.3)  # sigma in that unit: pixels, interpolation, a tokenizer's blur
STRETCHES = ((1.0, 1.0), (0.9, 1.1), (1.1, 0.9))  # in x and y
TEMPLATE_CANVAS = 160  # pixels on a side: fine enough to take outlines from
TEMPLATE_SIZE = 0.4  # of the canvas: leaves room for the blur


class Outline(NamedTuple):
    """The template nearest to a thing. x, y: centre of its shape; size: diameter; in pixels.

    likeness: cosine of the angle between the thing and the template, 0 to 1.
    """

    shape: str
    x: float
    y: float
    size: float
    likeness: float


class _Templates(NamedTuple):
    outlines: np.ndarray  # [T, G*G], of length 1
    shapes: list[str]  # [T]
    centres: np.ndarray  # [T, 2]: x, y of the shape's centre from its centroid, in roots of area
    sizes: np.ndarray  # [T]: in the same unit


class _Moments(NamedTuple):
    x: float  # of the centroid, in pixels
    y: float
    unit: float  # square root of the area


def nearest_outline(coverage: np.ndarray) -> Outline:
    """Find the shape that a thing's coverage [S, S], in 0 to 1, resembles most."""
    templates = _templates()
    moments = _moments(coverage)
    outline = _on_grid(coverage, moments, (1.0, 1.0))
    likeness = templates.outlines @ _unit_length(outline)  # [T]
    best = int(likeness.argmax())
    right, down = (templates.centres[best] * moments.unit).tolist()
    size = float(templates.sizes[best]) * moments.unit
    # 0.5: the centre of pixel 0 lies at half a pixel
    return Outline(templates.shapes[best], moments.x + 0.5 + right, moments.y + 0.5 + down, size,
                   min(1.0, float(likeness[best])))


@cache
def _templates() -> _Templates:
    """Draw every shape, blurred and stretched in every way."""
    outlines, shapes, centres, sizes = [], [], [], []
    middle = TEMPLATE_CANVAS / 2 - 0.5
    for shape in SHAPES:
        thing = Thing(shape, "black", 0.5, 0.5, TEMPLATE_SIZE)
        pixels = draw_scene(Scene((thing,)), TEMPLATE_CANVAS)
        darkness = Image.fromarray(255 - pixels[:, :, 0])
        moments = _moments(np.asarray(darkness) / (255 - COLORS["black"][0]))
        for blur in BLURS:
            blurred = darkness.filter(ImageFilter.GaussianBlur(blur * moments.unit))
            coverage = np.asarray(blurred, dtype=np.float32)
            for stretch in STRETCHES:
                outlines.append(_unit_length(_on_grid(coverage, moments, stretch)))
                shapes.append(shape)
                centres.append([(middle - moments.x) / moments.unit * stretch[0],
                                (middle - moments.y) / moments.unit * stretch[1]])
                # a diameter is one number: it changes by the geometric mean of the two
                mean_stretch = (stretch[0] * stretch[1]) ** 0.5
                sizes.append(TEMPLATE_SIZE * TEMPLATE_CANVAS / moments.unit * mean_stretch)
    return _Templates(np.array(outlines, dtype=np.float32), shapes, np.array(centres),
                      np.array(sizes))


def _unit_length(outline: np.ndarray) -> np.ndarray:
    return outline / np.linalg.norm(outline)


def _moments(coverage: np.ndarray) -> _Moments:
    """Centroid and square root of the area, which blur does not change."""
    height, width = coverage.shape
    area = coverage.sum()
    x = coverage.sum(axis=0) @ np.arange(width) / area
    y = coverage.sum(axis=1) @ np.arange(height) / area
    return _Moments(float(x), float(y), float(area**0.5))


def _on_grid(coverage: np.ndarray, moments: _Moments, stretch: tuple[float, float]) -> np.ndarray:
    """Coverage on a grid around the centroid: [G*G] float32, 0 outside the image."""
    steps = np.linspace(-GRID_REACH, GRID_REACH, GRID_SIDE) * moments.unit
    stretch_x, stretch_y = stretch
    rows = _interpolation(moments.y + steps / stretch_y, len(coverage))
    columns = _interpolation(moments.x + steps / stretch_x, len(coverage))
    return (rows @ coverage @ columns.T).astype(np.float32).reshape(-1)


def _interpolation(positions: np.ndarray, side: int) -> np.ndarray:
    """Weights [G, side] of the pixels in a row, for linear interpolation at positions [G]."""
    return np.clip(1 - np.abs(positions[:, None] - np.arange(side)), 0, 1)
