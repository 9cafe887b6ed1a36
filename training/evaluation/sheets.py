"""Pictures for people: labelled grids and curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
LABEL_LINES = 3
FONT_SIZE = 11


def labelled_grid(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], side: int = 96,
                  columns: int = 8) -> Image.Image:
    """Sections of (title, [(caption, picture), ...]) as one picture: each picture `side` pixels with its caption below."""
    font = ImageFont.load_default(size=FONT_SIZE)
    title_font = ImageFont.load_default(size=FONT_SIZE + 5)
    cell_width, cell_height = side + 2 * MARGIN, side + MARGIN + (FONT_SIZE + 3) * LABEL_LINES
    title_height = FONT_SIZE + 4 * MARGIN
    heights = [title_height + -(-len(cells) // columns) * cell_height for _, cells in rows]
    sheet = Image.new("RGB", (columns * cell_width, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, cells), height in zip(rows, heights, strict=True):
        draw.text((MARGIN, top + MARGIN), title, fill="black", font=title_font)
        for number, (caption, picture) in enumerate(cells):
            left = number % columns * cell_width + MARGIN
            upper = top + title_height + number // columns * cell_height
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, upper))
            draw.rectangle((left - 1, upper - 1, left + side, upper + side), outline="#cccccc")
            label = "\n".join(textwrap.wrap(caption, width=max(8, side // 6))[:LABEL_LINES])
            draw.multiline_text((left, upper + side + 2), label, fill="#333333", font=font, spacing=1)
        top += height
    return sheet


def side_by_side(pictures: Sequence[tuple[str, Any, Any]], factor: int = 4, side: int = 128) -> Image.Image:
    """Columns of (label, original, reconstruction), both uint8 [S, S, 3]: original above reconstruction above |difference|.

    The difference is multiplied by `factor`, which is written beside it. Pictures are shown at a whole multiple of their size
    of about `side` pixels, without smoothing, and larger ones at their own size up to twice `side`.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    own = pictures[0][1].shape[0]
    shown = min(own, 2 * side) if own >= side else own * max(1, side // own)
    names = ["original", "reconstruction", f"|difference| x{factor}"]
    left_of = 2 * MARGIN + int(max(font.getlength(name) for name in names))
    top_of = 2 * MARGIN + 2 * (FONT_SIZE + 3)
    step = shown + MARGIN
    sheet = Image.new("RGB", (left_of + step * len(pictures), top_of + step * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((MARGIN, top_of + row * step + shown // 2), name, fill="black", font=font, anchor="lm")
    for column, (label, original, reconstruction) in enumerate(pictures):
        left = left_of + column * step
        draw.multiline_text((left, MARGIN), label, fill="black", font=font, spacing=1)
        difference = numpy.abs(original.astype(int) - reconstruction.astype(int)) * factor
        for row, pixels in enumerate((original, reconstruction, difference.clip(0, 255).astype(numpy.uint8))):
            resample = Image.Resampling.NEAREST if shown >= own else Image.Resampling.BOX
            sheet.paste(Image.fromarray(pixels).resize((shown, shown), resample), (left, top_of + row * step))
    return sheet


