"""Plots of curves and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor


def _subplots(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """pyplot's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_curves(panels: Sequence[tuple[str, list[dict[str, Any]], Sequence[str]]], path: Path, small_too: bool = False) -> None:
    """One panel a (title, rows of metrics.jsonl, names of the curves), written as a PNG.

    small_too: a scale that is logarithmic on both sides of 0, so that what falls by a factor of 100 still shows.
    """
    figure, axes = _subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (title, rows, names) in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        if small_too:
            axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
        else:
            axis.set_ylabel(names[0])
    _save(figure, path)


def plot_lines(x_name: str, x: Sequence[float], panels: Sequence[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    """One panel a (title, name -> values at x), written as a PNG."""
    figure, axes = _subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for name, values in lines.items():
            axis.plot(x, values, marker="o", markersize=3, label=name)
        axis.set_title(title)
        axis.set_xlabel(x_name)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)  # below, where no line is
    _save(figure, path)


def plot_codebook(rows: list[dict[str, Any]], counts: Tensor, codebook_size: int, path: Path) -> None:
    """Health of a codebook as a PNG: shares in use and restarts over the steps; use of each code, counts [K], in order."""
    rows = [row for row in rows if "codebook_usage" in row]  # lines of a held-out split have none
    figure, (over_time, restarts, histogram) = _subplots(1, 3, figsize=(15, 3.6))
    steps = [row["step"] for row in rows]
    over_time.plot(steps, [row["codebook_usage"] for row in rows], label="share of codes in use")
    over_time.plot(steps, [row["codebook_perplexity"] / codebook_size for row in rows], label="perplexity / codebook size")
    over_time.set_ylim(0, 1.02)
    over_time.set_title(f"codebook of {codebook_size:,}")
    over_time.legend()
    restarts.step(steps, [row["restarted_codes"] for row in rows], where="pre")
    restarts.set_title("dead codes restarted since the line before")
    shares = counts.double().sort(descending=True).values / max(1, int(counts.sum())) * codebook_size
    histogram.plot(shares.clamp(min=1e-3))
    histogram.axhline(1.0, color="grey", linewidth=0.8)
    histogram.set_yscale("log")
    histogram.set_title("use of each code / mean use, most used first")
    for axis, label in ((over_time, "step"), (restarts, "step"), (histogram, "code")):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_positions(losses: Sequence[float], grid: tuple[int, int], path: Path) -> None:
    """The loss in nats at each position of the raster, as a PNG: over the picture, and along it with the mean of each row."""
    import matplotlib

    matplotlib.use("Agg")

    values = numpy.array(losses).reshape(grid)
    figure, (left, right) = _subplots(1, 2, figsize=(9, 3.6), width_ratios=(1, 1.4))
    figure.colorbar(left.imshow(values, cmap="viridis"), ax=left)
    left.set_title("nats a token, over the picture")
    right.plot(losses, linewidth=0.8, label="token")
    right.plot(numpy.arange(grid[0]) * grid[1] + (grid[1] - 1) / 2, values.mean(axis=1), marker="o", markersize=3,
               label="mean of a row")
    right.set_xlabel("position in raster order")
    right.set_ylabel("nats")
    right.legend()
    _save(figure, path)
