"""Scenes of coloured shapes: drawn at random from a seed, rendered, described.

Positions and sizes are in canvas units: x and y of a centre run from 0 (left, top) to 1, a size is
a diameter.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = {"red": (220, 38, 38), "orange": (249, 140, 20), "yellow": (250, 215, 30),
          "green": (30, 150, 70), "blue": (37, 90, 220), "purple": (140, 60, 190),
          "black": (25, 25, 25)}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
LAYOUT_GRID = 16
_SUPERSAMPLE = 4  # drawn so much larger and averaged: Pillow's own edges are not anti-aliased

Combination = tuple[str, str]  # color, shape
COMBINATIONS: list[Combination] = [(color, shape) for color in COLORS for shape in SHAPES]


@dataclass(frozen=True)
class Thing:
    """One shape on the canvas."""

    shape: str
    color: str
    x: float
    y: float
    size: float

    @property
    def combination(self) -> Combination:
        """Its color and shape."""
        return self.color, self.shape

    @property
    def words(self) -> str:
        """'an orange star'."""
        article = "an" if self.color[0] in "aeiou" else "a"
        return f"{article} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things that do not overlap.

    relation: where the first lies as seen from the second, a key of OPPOSITE; "" for none.
    """

    things: tuple[Thing, ...]
    relation: str = ""

    def plain(self) -> dict[str, Any]:
        """Return the exact description, for the columns of the dataset."""
        return {"objects": [asdict(thing) for thing in self.things], "relation": self.relation,
                "count": len(self.things), "layout": layout_grid(self)}


# ---- draw a scene at random

def make_scene(generator: random.Random, allowed: list[Combination], max_objects: int,
               required: list[Combination] | None = None) -> Scene:
    """Make a random scene of `allowed` combinations, at least one of them from `required`."""
    kinds = ["one"]
    if max_objects > 1:
        kinds += ["relation", "relation", "count"]  # relations twice as often
    kind = generator.choice(kinds)
    first = generator.choice(required or allowed)

    if kind == "one":
        return _make_single(generator, first)
    if kind == "count":
        return _make_count(generator, first, generator.randint(2, max_objects))
    second = generator.choice([other for other in allowed if other != first])
    return _make_relation(generator, first, second)


def _make_single(generator: random.Random, combination: Combination) -> Scene:
    # a wide gap, so that "small" and "large" in captions are never doubtful
    small, large = generator.uniform(0.26, 0.34), generator.uniform(0.54, 0.68)
    size = generator.choice((small, large))
    jitter = 0.48 - size / 2  # as far as it stays on the canvas
    return Scene((_place(generator, combination, 0.5, 0.5, size, jitter),))


def _make_count(generator: random.Random, combination: Combination, number: int) -> Scene:
    """`number` equal things, each in a quarter of the canvas."""
    # centres at least 0.46 - 2 * 0.04 apart, and sizes below that: no two things touch
    centres = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    things = []
    for x, y in generator.sample(centres, number):
        size = generator.uniform(0.28, 0.36)
        things.append(_place(generator, combination, x, y, size, 0.04))
    return Scene(tuple(things))


def _make_relation(generator: random.Random, first: Combination, second: Combination) -> Scene:
    pair = [first, second]
    # `first` may be a required combination, which must not always come first in the caption
    generator.shuffle(pair)
    relation = generator.choice(list(OPPOSITE))
    # at least 0.48 - 2 * 0.03 apart, the largest size: no two things overlap
    along = (0.26, 0.74) if relation in ("above", "left of") else (0.74, 0.26)
    across = generator.uniform(0.4, 0.6)  # nearly aligned, so that only one relation is true

    things = []
    for combination, position in zip(pair, along, strict=True):
        size = generator.uniform(0.3, 0.42)
        x, y = (across, position) if relation in ("above", "below") else (position, across)
        things.append(_place(generator, combination, x, y, size, 0.03))
    return Scene(tuple(things), relation)


def _place(generator: random.Random, combination: Combination, x: float, y: float, size: float,
           jitter: float) -> Thing:
    color, shape = combination
    x += generator.uniform(-jitter, jitter)
    y += generator.uniform(-jitter, jitter)
    # rounded, so that the columns of the dataset say exactly what is drawn
    return Thing(shape, color, round(x, 4), round(y, 4), round(size, 4))


# ---- describe

def describe(scene: Scene) -> list[str]:
    """Write several captions that are all true of the scene, the plainest first."""
    first = scene.things[0]
    if scene.relation:
        second = scene.things[1]
        return [f"{first.words} {scene.relation} {second.words}",
                f"{second.words} {OPPOSITE[scene.relation]} {first.words}",
                f"{first.words} that is {scene.relation} {second.words}",
                f"{first.words} and {second.words}",
                f"there is {first.words} {scene.relation} {second.words}, on white"]

    count = len(scene.things)
    if count > 1:
        number = NUMBERS[count]
        ending = "es" if first.shape == "cross" else "s"
        things = f"{first.color} {first.shape}{ending}"
        return [f"{number} {things}", f"{count} {things}", f"a picture of {number} {things}",
                f"{number} {things} on a white background"]

    # in the gap between the sizes of `_make_single`
    size = "large" if first.size > 0.45 else "small"
    return [first.words, f"one {first.color} {first.shape}",
            f"a {size} {first.color} {first.shape}", f"a picture of {first.words}",
            f"{first.words} on a white background"]


# ---- render

def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """Render a scene -> pixels uint8 [size, size, 3] on white, anti-aliased."""
    canvas = size * _SUPERSAMPLE
    image = Image.new("RGB", (canvas, canvas), "white")
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing, canvas, COLORS[thing.color])
    return np.asarray(image.reduce(_SUPERSAMPLE))


def layout_grid(scene: Scene) -> list[int]:
    """Return the class at the centre of each cell of a 16 x 16 grid, [256] in raster order.

    0 for background, else 1 + the index in COMBINATIONS.
    """
    scale = 8  # pixels per cell
    canvas = LAYOUT_GRID * scale
    image = Image.new("L", (canvas, canvas), 0)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing, canvas, 1 + COMBINATIONS.index(thing.combination))
    centres = slice(scale // 2, None, scale)
    return np.asarray(image)[centres, centres].reshape(-1).tolist()


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, canvas: int, fill: Any) -> None:
    x, y, radius = thing.x * canvas, thing.y * canvas, thing.size * canvas / 2
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        corners = [(x + radius * u, y + radius * v) for u, v in _OUTLINES[thing.shape]]
        draw.polygon(corners, fill=fill)


def _star() -> list[tuple[float, float]]:
    """Ten corners, alternately on the outer and an inner circle, clockwise from the top."""
    corners = []
    for number in range(10):
        radius = 1.0 if number % 2 == 0 else 0.42
        angle = number * math.pi / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


_ARM = 0.32
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    # corners in units of the radius; y grows downwards
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _star(),
    "cross": [(-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM),
              (_ARM, _ARM), (_ARM, 0.95), (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM),
              (-0.95, -_ARM), (-_ARM, -_ARM)]}
