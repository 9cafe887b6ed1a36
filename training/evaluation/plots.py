"""Plots of curves and histograms, written as PNG files."""

# Axes: N image tokens, K codebook size

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor


def _subplots(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """pyplot.subplots on a machine without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)  # pyplot keeps every figure until it is closed


def plot_curves(panels: Sequence[tuple[str, list[dict[str, Any]], Sequence[str]]], path: Path,
                small_too: bool = False) -> None:
    """Plot one panel per (title, rows of metrics.jsonl, names of the curves).

    small_too: use a scale that is logarithmic on both sides of 0, so that what falls by a factor
    of 100 still shows.
    """
    width = 5 * len(panels)
    figure, axes = _subplots(1, len(panels), figsize=(width, 3.6), squeeze=False)
    for axis, (title, rows, names) in zip(axes[0], panels, strict=True):
        for name in names:
            logged = [row for row in rows if row.get(name) is not None]
            if logged:
                steps = [row["step"] for row in logged]
                axis.plot(steps, [row[name] for row in logged], label=name)
        if small_too:  # not "log", which cannot show 0 or a negative loss
            axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
        else:
            axis.set_ylabel(names[0])
    _save(figure, path)


def plot_lines(x_name: str, x: Sequence[float],
               panels: Sequence[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    """Plot one panel per (title, name -> values at x)."""
    width = 4.2 * len(panels)
    figure, axes = _subplots(1, len(panels), figsize=(width, 3.6), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for name, values in lines.items():
            axis.plot(x, values, marker="o", markersize=3, label=name)
        axis.set_title(title)
        axis.set_xlabel(x_name)
        axis.grid(alpha=0.3)
        if len(lines) > 1:  # the legend goes below the panel, where no line is
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)
    _save(figure, path)


def plot_codebook(rows: list[dict[str, Any]], counts: Tensor, codebook_size: int,
                  path: Path) -> None:
    """Plot the health of a codebook: usage and restarts over the steps, and the use of each code.

    rows: of metrics.jsonl. counts [K]: how often each code was used.
    """
    rows = [row for row in rows if "codebook_usage" in row]  # lines of a held-out split have none
    steps = [row["step"] for row in rows]
    figure, (over_time, restarts, histogram) = _subplots(1, 3, figsize=(15, 3.6))

    over_time.plot(steps, [row["codebook_usage"] for row in rows], label="share of codes in use")
    over_time.plot(steps, [row["codebook_perplexity"] / codebook_size for row in rows],
                   label="perplexity / codebook size")
    over_time.set_ylim(0, 1.02)
    over_time.set_title(f"codebook of {codebook_size:,}")
    over_time.legend()

    # "pre": a count belongs to the steps before its line
    restarts.step(steps, [row["restarted_codes"] for row in rows], where="pre")
    restarts.set_title("dead codes restarted since the line before")

    most_used_first = counts.double().sort(descending=True).values
    total = max(1, int(counts.sum()))
    relative_use = most_used_first / total * codebook_size
    histogram.plot(relative_use.clamp(min=1e-3))  # a dead code has a place on the log scale too
    histogram.axhline(1.0, color="grey", linewidth=0.8)
    histogram.set_yscale("log")
    histogram.set_title("use of each code / mean use, most used first")

    for axis, label in ((over_time, "step"), (restarts, "step"), (histogram, "code")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_positions(losses: Sequence[float], grid: tuple[int, int], path: Path) -> None:
    """Plot the loss in nats at each raster position [N]: as a map, and as a line with row means."""
    rows, columns = grid
    values = numpy.array(losses).reshape(grid)  # raster order: row by row
    figure, (over_image, along_raster) = _subplots(1, 2, figsize=(9, 3.6), width_ratios=(1, 1.4))

    figure.colorbar(over_image.imshow(values, cmap="viridis"), ax=over_image)
    over_image.set_title("nats a token, over the picture")

    middle_of_row = numpy.arange(rows) * columns + (columns - 1) / 2
    along_raster.plot(losses, linewidth=0.8, label="token")
    along_raster.plot(middle_of_row, values.mean(axis=1), marker="o", markersize=3,
                      label="mean of a row")
    along_raster.set_xlabel("position in raster order")
    along_raster.set_ylabel("nats")
    along_raster.legend()
    _save(figure, path)
