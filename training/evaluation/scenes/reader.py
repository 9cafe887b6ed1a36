"""Read coloured shapes off images of `training.data.builders.scenes`, drawn or generated.

No network is needed:

1  Paint: every pixel is a mixture of white and one palette colour; project it on each line from
   white to a colour. The edge of a red thing is then pale red, not orange. The colour is that of
   the nearest line, averaged over 3 x 3 pixels.
2  Things: connected pixels that are painted enough. What resembles no outline is split by colour
   or by place, if its parts do.
3  Shape: centroid and area, which blur does not change, put a thing on a grid; the outline drawn
   by `scenes.py`, stretched and blurred a little, with the largest cosine of the angle to it (0 to
   1, its likeness) names the shape.

What it tolerates, as the share of 400 random scenes of up to 4 things in which every colour and
shape is read right:

| at 32 / 64 px | share |
|---|---|
| as drawn; colours off by 30; noise of standard deviation 35 | 1.00 / 1.00 |
| JPEG of quality 30 (colour at full resolution); blur of sigma 0.9 px at 32 | 0.99 / 1.00 |
| blur of sigma 1.2 px at 32, 2.4 px at 64 | 0.99 / 0.99 |
| blur 0.8 (1.6) px, noise 12, colours off by 20 and JPEG 50 together | 0.99 / 1.00 |
| squeezed in one direction by a quarter (of 80) | — / 1.00 |
| outlines bent by 0.5 (1) px; by 1 (2) px, where a person doubts too | 1.00 / 1.00; 0.82 / 0.68 |
| colours paled to 80 %; to 75 % | 0.97 / 1.00; 0.75 / 1.00 (of 100) |

At 16 px 0.98 as drawn, but 0.73 with the mixture. Two things of like size that touch are told
apart in 0.99 of clean pairs, 0.90 (0.98) with the mixture; a small one of another colour at a large
one in 0.96, but 0.5 (0.7) with the mixture.

Not seen: paint paler than 40 %, spots below 0.6 % of the canvas. It is not strict on shapes: a blob
of no shape is mostly read as the nearest one, and only the oddest become "unclear".
"""

# Axes: S side of the image after averaging down, C colours of the palette

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from tokenloom_common.errors import UserError
from training.data.builders.scenes import COLORS, Combination
from training.evaluation.scenes.outlines import nearest_outline
from training.evaluation.scenes.regions import Mask, cuts_by_place, large_parts, with_margin

SMALLEST, LARGEST = 16, 512  # pixels on a side, as in training.data.builders.shapes
WORKING_SIDE = 64  # larger images are averaged down to at least this, by a whole factor
UNCLEAR = "unclear"  # the color or shape of a thing that resembles none; no caption asks for it
MIN_WHITE = 0.4  # of the pixels: with less background, the image is not a scene at all
SOLID = 0.4  # coverage above which a pixel makes a thing
TRACE = 0.1  # coverage above which a pixel still belongs to the thing beside it
SPECK = 0.006  # of the canvas; the smallest thing of `make_scene`, a star of 0.26, has 0.021
MARGIN = 2 / 32  # of the side: how far around its solid pixels a thing's blurred edge is followed
SURE = 0.965  # likeness below which a thing is split, if ...
SPLIT_GAIN = 0.03  # ... the worst of its parts is this much more like a shape
MIN_SHARE = 0.08  # of a thing's solid pixels that a colour needs for a part of its own
MIN_LIKENESS = 0.92  # below: shape unclear
MAX_HUE_ERROR = 55.0  # colour unclear: distance of the mean from the line, in 8-bit steps
MIN_DEPTH = 0.65  # colour unclear: too pale
MIN_PURITY = 0.6  # colour unclear: share of the pixels that are nearest to it
_INK = 255.0 - np.array(list(COLORS.values()), dtype=np.float32)  # [C, 3]: taken off white


class Seen(NamedTuple):
    """A thing on an image, in the canvas units of `Thing`.

    likeness: 0 to 1, how well its outline fits the shape.
    """

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
    off_line: np.ndarray  # [S, S, C]: squared distance to the line from white, summed over 3 x 3
    nearest: np.ndarray  # [S, S]: colour with the smallest off_line
    covered: np.ndarray  # [S, S]: coverage by the nearest colour
    ink: np.ndarray  # [S, S, 3]: 255 minus the pixels
    side: float  # of the canvas in these pixels; averaging down may leave a part of a pixel


def read_scene(pixels: np.ndarray) -> list[Seen]:
    """Find the things on pixels uint8 [S, S, 3], S in 16 to 512, from the top.

    [] where little is white. A thing of no palette colour, or like no shape, is there with the
    color or shape "unclear". UserError for other pixels.
    """
    paint = _paint(_checked(pixels))
    if (paint.covered < SOLID).mean() < MIN_WHITE:
        return []
    solid = paint.covered > SOLID
    cores = large_parts(np.where(solid, 1, 0), SPECK * paint.side**2)
    traces = paint.covered > TRACE
    seen: list[Seen] = []
    for region in with_margin(cores, traces, round(MARGIN * paint.side)):
        whole = _identify(region, solid, paint)
        if whole.likeness < SURE:
            seen += _split(region, solid, paint, whole)
        else:
            seen.append(whole)
    return sorted(seen, key=lambda thing: (thing.y, thing.x))


def _checked(pixels: np.ndarray) -> np.ndarray:
    pixels = np.asarray(pixels)
    shape = pixels.shape
    square_rgb = len(shape) == 3 and shape[0] == shape[1] and shape[2] == 3
    if pixels.dtype != np.uint8 or not square_rgb:
        raise UserError(f"pixels of {pixels.dtype} {list(shape)}: a picture to read must be uint8 "
                        "[S, S, 3]")
    if not SMALLEST <= shape[0] <= LARGEST:
        raise UserError(f"a picture of {shape[0]} pixels: its side must lie in {SMALLEST} to "
                        f"{LARGEST}")
    return pixels


# ---- paint ----

def _paint(pixels: np.ndarray) -> _Paint:
    """Explain each pixel as a mixture of white and one palette colour."""
    factor = max(1, len(pixels) // WORKING_SIDE)
    smaller = Image.fromarray(pixels).reduce(factor)
    ink = 255.0 - np.asarray(smaller, dtype=np.float32)  # [S, S, 3]

    along = ink @ _INK.T  # [S, S, C]
    squared_length = np.square(_INK).sum(axis=1)  # [C]
    coverage = np.clip(along / squared_length, 0, 1)
    # |ink - coverage * colour|^2, multiplied out
    squared = np.square(ink).sum(axis=2, keepdims=True)
    distance = squared - 2 * coverage * along + coverage**2 * squared_length
    off_line = _sum_of_3x3(distance)

    nearest = off_line.argmin(axis=2)
    covered = np.take_along_axis(coverage, nearest[:, :, None], axis=2)[:, :, 0]
    return _Paint(coverage, off_line, nearest, covered, ink, len(pixels) / factor)


def _sum_of_3x3(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


# ---- touching things ----

def _split(region: Mask, solid: Mask, paint: _Paint, whole: Seen) -> list[Seen]:
    """Return the parts of touching things, or the whole.

    Parts count if each has a clear shape and resembles it more than the whole does.
    """
    min_pixels = 2 * SPECK * paint.side**2
    best = [whole]
    # by colour first: a cut by place must then gain on it
    for parts in (_cut_by_color(region, solid, paint, min_pixels), *cuts_by_place(region)):
        if len(parts) < 2 or any((part & solid).sum() < min_pixels for part in parts):
            continue
        things = [_identify(part, solid, paint) for part in parts]
        needed = max(MIN_LIKENESS, _least_likeness(best) + SPLIT_GAIN)
        if _least_likeness(things) > needed:
            best = things
    return best


def _least_likeness(things: list[Seen]) -> float:
    return min(thing.likeness for thing in things)


def _cut_by_color(region: Mask, solid: Mask, paint: _Paint, min_pixels: float) -> list[Mask]:
    core = region & solid
    counts = np.bincount(paint.nearest[core], minlength=len(COLORS))
    enough = max(min_pixels, MIN_SHARE * core.sum())
    present = np.flatnonzero(counts >= enough)
    if len(present) < 2:
        return []
    # pixels of the other colours, such as edges between two, go to the nearest of these
    nearest_present = paint.off_line[:, :, present].argmin(axis=2)
    classes = np.where(core, 1 + nearest_present, 0)
    parts = large_parts(classes, min_pixels)
    return with_margin(parts, region, round(2 * MARGIN * paint.side))


# ---- colour and shape of one thing ----

def _identify(region: Mask, solid: Mask, paint: _Paint) -> Seen:
    core = region & solid
    votes = np.bincount(paint.nearest[core], minlength=len(COLORS))
    number = int(votes.argmax())
    coverage = paint.coverage[:, :, number]
    depth = float(np.quantile(coverage[core], 0.9))
    pure = votes[number] >= MIN_PURITY * votes.sum()
    hue_error = _hue_error(paint.ink[core].mean(axis=0), number)
    clear = hue_error <= MAX_HUE_ERROR and pure and depth >= MIN_DEPTH
    color = list(COLORS)[number] if clear else UNCLEAR

    amount = np.where(region & (coverage > TRACE), coverage, 0)
    seen = _seen(amount, color, paint.side)
    if seen.likeness >= SURE:
        return seen
    # a pale thing has less area than its outline
    deeper = _seen(np.minimum(amount / depth, 1), color, paint.side)
    return max(seen, deeper, key=lambda thing: thing.likeness)


def _hue_error(mean: np.ndarray, number: int) -> float:
    """Distance of a mean ink [3] from the line of a palette colour, in 8-bit steps."""
    line = _INK[number] / np.linalg.norm(_INK[number])
    return float(np.linalg.norm(mean - mean @ line * line))


def _seen(coverage: np.ndarray, color: str, side: float) -> Seen:
    """The thing of a coverage [S, S], in canvas units."""
    outline = nearest_outline(coverage)
    shape = outline.shape if outline.likeness >= MIN_LIKENESS else UNCLEAR
    return Seen(shape, color, outline.x / side, outline.y / side, outline.size / side,
                outline.likeness)
