"""Chart of `benchmarks decode` documents: ms per token by batch and engine, guidance off and on.

    python -m benchmarks.decode.chart results/decode-*.json chart.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError, one_line, run_command

COLOURS = {"ours": "#1f6f8b", "ours int8": "#99c1cf", "x-transformers": "#d1495b",
           "transformers": "#edae49", "min-dalle": "#66a182"}
"""Engine -> colour, in the order of the bars."""
GROUP_WIDTH = 0.8  # of all bars of one batch size


def rows_of(documents: Sequence[dict[str, Any]]) -> dict[tuple[float, int, str], float]:
    """(guidance, batch, engine) -> ms per token; of a peer's variants the fastest."""
    found: dict[tuple[float, int, str], float] = {}
    for document in documents:
        for row in document["results"]:
            name = row["engine"].split(",")[0]  # a variant: "transformers, static cache"
            if name not in COLOURS:
                continue
            key = row["guidance"], row["batch"], name
            found[key] = min(row["ms_per_token"], found.get(key, row["ms_per_token"]))
    return found


def draw(documents: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the chart. UserError for documents without results."""
    from matplotlib.figure import Figure

    rows = rows_of(documents)
    if not rows:
        raise UserError("the documents hold no results")
    scales = sorted({guidance for guidance, _, _ in rows})
    measured = {engine for _, _, engine in rows}
    names = [name for name in COLOURS if name in measured]

    figure = Figure(figsize=(5.5 * len(scales), 3.6), layout="constrained")
    axes = figure.subplots(1, len(scales), squeeze=False)[0]
    for axis, guidance in zip(axes, scales, strict=True):
        _draw_bars(axis, rows, names, guidance)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)


def _draw_bars(axis: Any, rows: dict[tuple[float, int, str], float], names: list[str],
               guidance: float) -> None:
    """Draw one group of bars per batch size, one bar per engine."""
    batches = sorted({batch for scale, batch, _ in rows if scale == guidance})
    width = GROUP_WIDTH / len(names)
    for place, name in enumerate(names):
        heights = [rows.get((guidance, batch, name), float("nan")) for batch in batches]
        offset = (place - (len(names) - 1) / 2) * width
        centres = [group + offset for group in range(len(batches))]
        axis.bar(centres, heights, width, color=COLOURS[name], label=name)
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    title = "guidance off" if guidance == 1 else "guidance on (two rows a picture)"
    axis.set(xlabel="pictures at a time", ylabel="ms a token (less is better)", yscale="log",
             title=title)
    axis.grid(axis="y", alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the documents, all arguments but the last, into the file that the last one names."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 2 or not arguments[-1].endswith(".png"):
        raise UserError("usage: python -m benchmarks.decode.chart DOCUMENT.json ... CHART.png")
    *names, out = arguments
    try:
        documents = [json.loads(Path(name).read_text(encoding="utf-8")) for name in names]
    except (OSError, ValueError) as error:
        raise UserError(f"a document cannot be read ({one_line(error)})") from None
    draw(documents, Path(out))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda rest: main(rest), sys.argv[1:], "benchmarks.decode.chart"))
