"""Contact sheets: labelled grids of images, and originals beside their reconstructions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy
from PIL import Image, ImageDraw, ImageFont

MARGIN = 8  # pixels, as all sizes here
LABEL_LINES = 3
FONT_SIZE = 11

Cell = tuple[str, Image.Image]  # caption, image


def labelled_grid(sections: Sequence[tuple[str, Sequence[Cell]]], side: int = 96,
                  columns: int = 8) -> Image.Image:
    """Draw sections of (title, cells) below each other; each cell `side` pixels, caption below."""
    font = ImageFont.load_default(size=FONT_SIZE)
    title_font = ImageFont.load_default(size=FONT_SIZE + 5)
    cell_width = side + 2 * MARGIN
    cell_height = side + MARGIN + (FONT_SIZE + 3) * LABEL_LINES
    title_height = FONT_SIZE + 4 * MARGIN
    heights = []
    for _, cells in sections:
        rows = math.ceil(len(cells) / columns)
        heights.append(title_height + rows * cell_height)

    sheet = Image.new("RGB", (columns * cell_width, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    section_top = 0
    for (title, cells), height in zip(sections, heights, strict=True):
        draw.text((MARGIN, section_top + MARGIN), title, fill="black", font=title_font)
        for number, (caption, image) in enumerate(cells):
            row, column = divmod(number, columns)
            left = column * cell_width + MARGIN
            top = section_top + title_height + row * cell_height
            shown = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left, top))
            draw.rectangle((left - 1, top - 1, left + side, top + side), outline="#cccccc")
            # a letter of this font is about 6 pixels wide
            lines = textwrap.wrap(caption, width=max(8, side // 6))[:LABEL_LINES]
            draw.multiline_text((left, top + side + 2), "\n".join(lines), fill="#333333",
                                font=font, spacing=1)
        section_top += height
    return sheet


def side_by_side(columns: Sequence[tuple[str, numpy.ndarray, numpy.ndarray]], factor: int = 4,
                 side: int = 128) -> Image.Image:
    """Draw columns of (label, original, reconstruction), both uint8 [S, S, 3].

    From the top: original, reconstruction, and |difference| multiplied by `factor`. Images are
    shown at a whole multiple of their size of about `side` pixels, without smoothing, and larger
    ones at their own size up to twice `side`.
    """
    own = columns[0][1].shape[0]
    if own >= side:
        shown = min(own, 2 * side)
    else:
        shown = own * max(1, side // own)
    # enlarged pixels stay squares; a smaller image takes plain means
    resample = Image.Resampling.NEAREST if shown >= own else Image.Resampling.BOX

    font = ImageFont.load_default(size=FONT_SIZE)
    names = ["original", "reconstruction", f"|difference| x{factor}"]
    names_width = 2 * MARGIN + int(max(font.getlength(name) for name in names))
    labels_height = 2 * MARGIN + 2 * (FONT_SIZE + 3)
    step = shown + MARGIN
    size = (names_width + step * len(columns), labels_height + step * len(names))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        middle = labels_height + row * step + shown // 2
        draw.text((MARGIN, middle), name, fill="black", font=font, anchor="lm")

    for column, (label, original, reconstruction) in enumerate(columns):
        left = names_width + column * step
        draw.multiline_text((left, MARGIN), label, fill="black", font=font, spacing=1)
        # int: a difference of uint8 would wrap around
        difference = numpy.abs(original.astype(int) - reconstruction.astype(int)) * factor
        amplified = difference.clip(0, 255).astype(numpy.uint8)
        for row, pixels in enumerate((original, reconstruction, amplified)):
            image = Image.fromarray(pixels).resize((shown, shown), resample)
            sheet.paste(image, (left, labels_height + row * step))
    return sheet
