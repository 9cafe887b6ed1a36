"""Which coloured shapes does a picture show? Reads pictures of `training.data.builders.scenes`, drawn or generated; needs no network.

1  Paint: every pixel is a mixture of white and one palette colour; project it on each line from white to a colour. The edge
   of a red thing is then pale red, not orange. The colour is that of the nearest line, averaged over 3 x 3 pixels.
2  Things: connected pixels that are painted enough. What resembles no outline is split by colour or by place, if its parts do.
3  Shape: centroid and area, which blur does not change, put a thing on a grid; the outline drawn by `scenes.py`, stretched
   and blurred a little, with the largest cosine of the angle to it (0 to 1, its likeness) names the shape.

What it tolerates, as the share of 400 random scenes of up to 4 things in which every colour and shape is read right:

| at 32 / 64 px | share |
|---|---|
| as drawn; colours off by 30; noise of standard deviation 35 | 1.00 / 1.00 |
| JPEG of quality 30 (colour at full resolution); blur of sigma 0.9 px at 32 | 0.99 / 1.00 |
| blur of sigma 1.2 px at 32, 2.4 px at 64 | 0.99 / 0.99 |
| blur 0.8 (1.6) px, noise 12, colours off by 20 and JPEG 50 together | 0.99 / 1.00 |
| squeezed in one direction by a quarter (of 80) | — / 1.00 |
| outlines bent by 0.5 (1) px; by 1 (2) px, where a person doubts too | 1.00 / 1.00; 0.82 / 0.68 |
| colours paled to 80 %; to 75 % | 0.97 / 1.00; 0.75 / 1.00 (of 100) |

At 16 px 0.98 as drawn, but 0.73 with the mixture. Two things of like size that touch are told apart in 0.99 of clean pairs,
0.90 (0.98) with the mixture; a small one of another colour at a large one in 0.96, but 0.5 (0.7) with the mixture.

Not seen: paint paler than 40 %, spots below 0.6 % of the canvas. It is not strict on shapes: a blob of no shape is mostly
read as the nearest one, and only the oddest become "unclear".
"""

# Axes: S side of the picture after averaging down, C colours of the palette, T templates, G side of a template's grid

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from tokenloom_common.errors import UserError
from training.data.builders.scenes import COLORS, SHAPES, Combination, Scene, Thing, draw_scene

SMALLEST, LARGEST = 16, 512  # pixels on a side, as in training.data.builders.shapes
WORKING_SIDE = 64  # larger pictures are averaged down to at least this, by a whole factor
UNCLEAR = "unclear"  # the color or shape of a thing that resembles none; no caption asks for it
MIN_WHITE = 0.4  # of the pixels: with less background, the picture is not a scene at all
SOLID, TRACE = 0.4, 0.1  # coverage above which a pixel makes a thing, and above which it still belongs to its neighbour
SPECK = 0.006  # of the canvas; the smallest thing of `make_scene`, a star of 0.26, has 0.021
MARGIN = 2 / 32  # of the side: how far around its solid pixels a thing's blurred edge is followed
SURE, SPLIT_GAIN = 0.965, 0.03  # a thing below the first is split if the worst part gains the second
MAX_PARTS = 4
MIN_SHARE = 0.08  # of a thing's solid pixels that a colour needs for a part of its own
MIN_LIKENESS = 0.92  # below: shape unclear
MAX_HUE_ERROR, MIN_DEPTH, MIN_PURITY = 55.0, 0.65, 0.6  # colour unclear: off the line in 8-bit steps, too pale, too mixed
GRID_SIDE, GRID_REACH = 24, 1.1  # of the templates; reach in units of the square root of a thing's area
BLURS = (0.05, 0.1, 0.15, 0.2, 0.3)  # sigma in the same unit: pixel size, interpolation and what a tokenizer adds
STRETCHES = ((1.0, 1.0), (0.9, 1.1), (1.1, 0.9))  # in x and y
_INK = 255.0 - np.array(list(COLORS.values()), dtype=np.float32)  # [C, 3]: what each colour takes off white


class Seen(NamedTuple):
    """A thing on a picture, in the canvas units of `Thing`; `likeness` in 0 to 1 is how well its outline fits the shape."""

    shape: str
    color: str
    x: float
    y: float
    size: float
    likeness: float

    @property
    def combination(self) -> Combination:
        """Its color and shape."""
        return self.color, self.shape


class _Paint(NamedTuple):
    coverage: np.ndarray  # [S, S, C] in 0 to 1: how much of the pixel each colour would cover
    off_line: np.ndarray  # [S, S, C]: squared distance to the line from white to the colour, summed over 3 x 3 pixels
    nearest: np.ndarray  # [S, S]: colour with the smallest off_line
    covered: np.ndarray  # [S, S]: coverage by the nearest colour
    ink: np.ndarray  # [S, S, 3]: 255 minus the pixels
    side: float  # of the canvas in these pixels; no whole number where the averaged picture has a part of a pixel more


class _Templates(NamedTuple):
    outlines: np.ndarray  # [T, G*G], of length 1
    shapes: list[str]  # [T]
    centre: np.ndarray  # [T, 2]: x, y of the shape's centre seen from its centroid, in square roots of its area
    size: np.ndarray  # [T]: in the same unit


def read_scene(pixels: np.ndarray) -> list[Seen]:
    """Pixels uint8 [S, S, 3], S in 16 to 512, things on white -> what is seen, from the top; [] where little is white.

    A thing of no palette colour, or like no shape, is there with the color or shape "unclear". UserError for other pixels.
    """
    paint = _paint(_checked(pixels))
    if (paint.covered < SOLID).mean() < MIN_WHITE:
        return []
    solid = paint.covered > SOLID
    cores = _large_parts(np.where(solid, 1, 0), SPECK * paint.side**2)
    seen: list[Seen] = []
    for region in _with_margin(cores, paint.covered > TRACE, round(MARGIN * paint.side)):
        whole = [_identify(region, solid, paint)]
        seen += _split(region, solid, paint, whole) if whole[0].likeness < SURE else whole
    return sorted(seen, key=lambda thing: (thing.y, thing.x))


def _checked(pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels)
    shape = pixels.shape
    if pixels.dtype != np.uint8 or len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3:
        raise UserError(f"pixels of {pixels.dtype} {list(shape)}: a picture to read must be uint8 [S, S, 3]")
    if not SMALLEST <= shape[0] <= LARGEST:
        raise UserError(f"a picture of {shape[0]} pixels: its side must lie in {SMALLEST} to {LARGEST}")
    return pixels


# ---- paint ----

def _paint(pixels: np.ndarray) -> _Paint:
    factor = max(1, len(pixels) // WORKING_SIDE)
    ink = 255.0 - np.asarray(Image.fromarray(pixels).reduce(factor), dtype=np.float32)
    along, length = ink @ _INK.T, np.square(_INK).sum(axis=1)  # [S, S, C], [C]
    coverage = np.clip(along / length, 0, 1)
    squared = np.square(ink).sum(axis=2, keepdims=True) - 2 * coverage * along + coverage**2 * length
    off_line = _sum_of_3x3(squared)
    nearest = off_line.argmin(axis=2)
    covered = np.take_along_axis(coverage, nearest[:, :, None], axis=2)[:, :, 0]
    return _Paint(coverage, off_line, nearest, covered, ink, len(pixels) / factor)


def _sum_of_3x3(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


# ---- things ----

def _large_parts(classes: np.ndarray, min_pixels: float) -> list[np.ndarray]:
    """Masks of the parts of at least `min_pixels` that hang together over edges within one class other than 0.

    Every pixel takes the smallest index among its neighbours, then the index which that one has: a few rounds, no scipy.
    """
    beside, below = classes[:, 1:] == classes[:, :-1], classes[1:] == classes[:-1]
    label = np.arange(classes.size).reshape(classes.shape)
    while True:
        low = label.copy()
        for same, a, b in ((beside, np.s_[:, 1:], np.s_[:, :-1]), (below, np.s_[1:], np.s_[:-1])):
            lower = np.where(same, np.minimum(low[a], low[b]), label.size)
            low[a] = np.minimum(low[a], lower)  # two lines: the slices overlap
            low[b] = np.minimum(low[b], lower)
        low = low.ravel()[low]
        if (low == label).all():
            break
        label = low
    found, counts = np.unique(label[classes > 0], return_counts=True)
    return [label == number for number in found[counts >= min_pixels]]


def _with_margin(cores: list[np.ndarray], allowed: np.ndarray, steps: int) -> list[np.ndarray]:
    """The cores, all grown at once by `steps` pixels into `allowed`; none grows into another."""
    label = np.zeros(allowed.shape, dtype=np.int64)
    for number, core in enumerate(cores, 1):
        label[core] = number
    for _ in range(steps):
        padded = np.pad(label, 1)
        around = np.maximum(np.maximum(padded[:-2, 1:-1], padded[2:, 1:-1]), np.maximum(padded[1:-1, :-2], padded[1:-1, 2:]))
        label = np.where((label == 0) & allowed, around, label)
    return [label == number for number in range(1, len(cores) + 1)]


def _split(region: np.ndarray, solid: np.ndarray, paint: _Paint, whole: list[Seen]) -> list[Seen]:
    """The parts of touching things, if each has a clear shape and resembles it more than the whole does; else the whole."""
    best, min_pixels = whole, 2 * SPECK * paint.side**2
    for parts in (_by_color(region, solid, paint, min_pixels), *_by_place(region)):
        if len(parts) > 1 and all((part & solid).sum() >= min_pixels for part in parts):
            things = [_identify(part, solid, paint) for part in parts]
            if min(t.likeness for t in things) > max(MIN_LIKENESS, min(t.likeness for t in best) + SPLIT_GAIN):
                best = things
    return best


def _by_color(region: np.ndarray, solid: np.ndarray, paint: _Paint, min_pixels: float) -> list[np.ndarray]:
    core = region & solid
    counts = np.bincount(paint.nearest[core], minlength=len(COLORS))
    there = np.flatnonzero(counts >= max(min_pixels, MIN_SHARE * core.sum()))
    if len(there) < 2:
        return []
    classes = np.where(core, 1 + paint.off_line[:, :, there].argmin(axis=2), 0)
    return _with_margin(_large_parts(classes, min_pixels), region, round(2 * MARGIN * paint.side))


def _by_place(region: np.ndarray) -> list[list[np.ndarray]]:
    """Ways to cut a region into 2 to 4 parts of about one width: k-means from points far apart, the same every time."""
    rows, columns = np.nonzero(region)
    points = np.stack([rows, columns], axis=1).astype(np.float32)
    starts = [points[np.square(points - points.mean(axis=0)).sum(axis=1).argmax()]]
    ways = []
    for _ in range(1, MAX_PARTS):
        starts.append(points[_squared_distances(points, np.array(starts)).min(axis=1).argmax()])
        means = np.array(starts)
        for _ in range(10):
            part = _squared_distances(points, means).argmin(axis=1)
            means = np.array([points[part == k].mean(axis=0) if (part == k).any() else means[k] for k in range(len(means))])
        labels = np.full(region.shape, -1)
        labels[rows, columns] = part
        ways.append([labels == k for k in range(len(means))])
    return ways


def _squared_distances(points: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.square(points[:, None] - means[None]).sum(axis=2)


# ---- colour and shape of one thing ----

def _identify(region: np.ndarray, solid: np.ndarray, paint: _Paint) -> Seen:
    core = region & solid
    votes = np.bincount(paint.nearest[core], minlength=len(COLORS))
    number = int(votes.argmax())
    coverage = paint.coverage[:, :, number]
    mean = paint.ink[core].mean(axis=0)
    line = _INK[number] / np.linalg.norm(_INK[number])
    depth = float(np.quantile(coverage[core], 0.9))
    clear = (np.linalg.norm(mean - mean @ line * line) <= MAX_HUE_ERROR and votes[number] >= MIN_PURITY * votes.sum()
             and depth >= MIN_DEPTH)
    color = list(COLORS)[number] if clear else UNCLEAR
    amount = np.where(region & (coverage > TRACE), coverage, 0)
    seen = _fit(amount, color, paint.side)
    if seen.likeness >= SURE:
        return seen
    deeper = _fit(np.minimum(amount / depth, 1), color, paint.side)  # a pale thing has less area than its outline
    return max(seen, deeper, key=lambda thing: thing.likeness)


def _fit(coverage: np.ndarray, color: str, side: float) -> Seen:
    templates = _templates()
    x, y, unit = _moments(coverage)
    outline = _on_grid(coverage, x, y, unit, (1.0, 1.0))
    likeness = templates.outlines @ (outline / np.linalg.norm(outline))  # [T]
    best = int(likeness.argmax())
    right, down = (templates.centre[best] * unit).tolist()
    return Seen(templates.shapes[best] if likeness[best] >= MIN_LIKENESS else UNCLEAR, color, (x + 0.5 + right) / side,
                (y + 0.5 + down) / side, float(templates.size[best]) * unit / side, min(1.0, float(likeness[best])))


@cache
def _templates() -> _Templates:
    side, size = 160, 0.4  # fine enough, with room for the blur
    outlines, shapes, centre, sizes = [], [], [], []
    for shape in SHAPES:
        pixels = draw_scene(Scene((Thing(shape, "black", 0.5, 0.5, size),)), side)
        coverage = Image.fromarray(255 - pixels[:, :, 0])
        x, y, unit = _moments(np.asarray(coverage) / (255 - COLORS["black"][0]))
        for blur in BLURS:
            soft = np.asarray(coverage.filter(ImageFilter.GaussianBlur(blur * unit)), dtype=np.float32)
            for stretch in STRETCHES:
                outline = _on_grid(soft, x, y, unit, stretch)
                outlines.append(outline / np.linalg.norm(outline))
                shapes.append(shape)
                centre.append([(side / 2 - 0.5 - x) / unit * stretch[0], (side / 2 - 0.5 - y) / unit * stretch[1]])
                sizes.append(size * side / unit * (stretch[0] * stretch[1]) ** 0.5)
    return _Templates(np.array(outlines, dtype=np.float32), shapes, np.array(centre), np.array(sizes))


def _moments(coverage: np.ndarray) -> tuple[float, float, float]:
    """x and y of the centroid, and the square root of the area, in pixels."""
    area = coverage.sum()
    rows, columns = np.arange(coverage.shape[0]), np.arange(coverage.shape[1])
    return float(coverage.sum(axis=0) @ columns / area), float(coverage.sum(axis=1) @ rows / area), float(area**0.5)


def _on_grid(coverage: np.ndarray, x: float, y: float, unit: float, stretch: tuple[float, float]) -> np.ndarray:
    """[G*G] float32: coverage on a grid around (x, y), between pixels by linear interpolation, 0 outside the picture."""
    steps = np.linspace(-GRID_REACH, GRID_REACH, GRID_SIDE) * unit
    rows, columns = _interpolation(y + steps / stretch[1], len(coverage)), _interpolation(x + steps / stretch[0], len(coverage))
    return (rows @ coverage @ columns.T).astype(np.float32).reshape(-1)


def _interpolation(positions: np.ndarray, side: int) -> np.ndarray:
    """[G, side]: weights with which pixels in a row make the values at these positions."""
    return np.clip(1 - np.abs(positions[:, None] - np.arange(side)), 0, 1)
