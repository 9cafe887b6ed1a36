"""Pictures for people: labelled grids and curves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def plot_curves(panels: Sequence[tuple[str, list[dict[str, Any]], Sequence[str]]], path: Path) -> None:
    """One panel a (title, rows of metrics.jsonl, names of the curves), written as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (title, rows, names) in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
        else:
            axis.set_ylabel(names[0])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
