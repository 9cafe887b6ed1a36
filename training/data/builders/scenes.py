"""Scenes of coloured shapes: chosen at random from a seed, drawn, described. Positions and sizes are in canvas units.

x and y of a centre run from 0 (left, top) to 1; an object's size is its diameter as a share of the canvas.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLORS = {"red": (220, 38, 38), "orange": (249, 140, 20), "yellow": (250, 215, 30), "green": (30, 150, 70),
          "blue": (37, 90, 220), "purple": (140, 60, 190), "black": (25, 25, 25)}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
LAYOUT_GRID = 16
_SUPERSAMPLE = 4

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
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things that do not overlap. `relation` says where the first lies as seen from the second; "" for none."""

    things: tuple[Thing, ...]
    relation: str = ""

    def plain(self) -> dict[str, Any]:
        """The exact description, for the columns of the data set."""
        return {"objects": [asdict(thing) for thing in self.things], "relation": self.relation,
                "count": len(self.things), "layout": layout_grid(self)}


def make_scene(generator: random.Random, allowed: list[Combination], max_objects: int,
               required: list[Combination] | None = None) -> Scene:
    """One random scene of `allowed` combinations; with `required`, at least one thing is from there."""
    kinds = ["one", "relation", "relation", "count"] if max_objects > 1 else ["one"]
    kind = generator.choice(kinds)
    first = generator.choice(required or allowed)
    if kind == "one":
        size = generator.choice((generator.uniform(0.26, 0.34), generator.uniform(0.54, 0.68)))
        return Scene((_place(generator, first, 0.5, 0.5, size, 0.48 - size / 2),))
    if kind == "count":
        number = generator.randint(2, max_objects)
        cells = generator.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], number)
        return Scene(tuple(_place(generator, first, x, y, generator.uniform(0.28, 0.36), 0.04) for x, y in cells))
    second = generator.choice([c for c in allowed if c != first])
    pair = [first, second]
    generator.shuffle(pair)
    relation = generator.choice(list(OPPOSITE))
    near, far = (0.26, 0.74) if relation in ("above", "left of") else (0.74, 0.26)
    across = generator.uniform(0.4, 0.6)  # nearly aligned, so that only one relation is true
    spots = [(across, near), (across, far)] if relation in ("above", "below") else [(near, across), (far, across)]
    return Scene(tuple(_place(generator, combination, x, y, generator.uniform(0.3, 0.42), 0.03)
                       for combination, (x, y) in zip(pair, spots, strict=True)), relation)


def _place(generator: random.Random, combination: Combination, x: float, y: float, size: float, jitter: float) -> Thing:
    color, shape = combination
    return Thing(shape, color, round(x + generator.uniform(-jitter, jitter), 4),
                 round(y + generator.uniform(-jitter, jitter), 4), round(size, 4))


def describe(scene: Scene) -> list[str]:
    """Several captions that are all true of the scene; the plainest comes first."""
    first = scene.things[0]
    if scene.relation:
        second = scene.things[1]
        return [f"{first.words} {scene.relation} {second.words}",
                f"{second.words} {OPPOSITE[scene.relation]} {first.words}",
                f"{first.words} that is {scene.relation} {second.words}", f"{first.words} and {second.words}",
                f"there is {first.words} {scene.relation} {second.words}, on white"]
    if len(scene.things) > 1:
        number = NUMBERS[len(scene.things)]
        things = f"{first.color} {first.shape}{'es' if first.shape == 'cross' else 's'}"
        return [f"{number} {things}", f"{len(scene.things)} {things}", f"a picture of {number} {things}",
                f"{number} {things} on a white background"]
    big = "large" if first.size > 0.45 else "small"
    return [first.words, f"one {first.color} {first.shape}", f"a {big} {first.color} {first.shape}",
            f"a picture of {first.words}", f"{first.words} on a white background"]


def draw_scene(scene: Scene, size: int) -> np.ndarray:
    """Scene -> pixels uint8 [size, size, 3] on white, anti-aliased."""
    wide = size * _SUPERSAMPLE
    image = Image.new("RGB", (wide, wide), "white")
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing, wide, COLORS[thing.color])
    return np.asarray(image.reduce(_SUPERSAMPLE))


def layout_grid(scene: Scene) -> list[int]:
    """[16 * 16] in raster order: 0 for background, else 1 + the index in COMBINATIONS of what covers its centre."""
    scale = 8
    image = Image.new("L", (LAYOUT_GRID * scale, LAYOUT_GRID * scale), 0)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing, image.width, 1 + COMBINATIONS.index(thing.combination))
    return np.asarray(image)[scale // 2::scale, scale // 2::scale].reshape(-1).tolist()


def _draw(draw: ImageDraw.ImageDraw, thing: Thing, canvas: int, fill: Any) -> None:
    x, y, radius = thing.x * canvas, thing.y * canvas, thing.size * canvas / 2
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in _OUTLINES[thing.shape]], fill=fill)


def _star() -> list[tuple[float, float]]:
    return [((1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
             -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5)) for k in range(10)]


_ARM = 0.32
_OUTLINES: dict[str, list[tuple[float, float]]] = {  # corners in units of the radius; y grows downwards
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _star(),
    "cross": [(-_ARM, -0.95), (_ARM, -0.95), (_ARM, -_ARM), (0.95, -_ARM), (0.95, _ARM), (_ARM, _ARM), (_ARM, 0.95),
              (-_ARM, 0.95), (-_ARM, _ARM), (-0.95, _ARM), (-0.95, -_ARM), (-_ARM, -_ARM)]}
