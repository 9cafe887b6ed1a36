"""Documents of `benchmarks decode` as a chart: ms a token of each engine over the batch, guidance off and on.

    python -m benchmarks.decode.chart results/decode-*.json chart.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError, one_line, run_command

ENGINES = {"ours": "#1f6f8b", "ours int8": "#99c1cf", "x-transformers": "#d1495b", "transformers": "#edae49",
           "min-dalle": "#66a182"}
"""Name -> colour, in the order of the bars."""


def rows_of(documents: Sequence[dict[str, Any]]) -> dict[tuple[float, int, str], float]:
    """(guidance, batch, engine) -> ms a token; of a peer's variants the fastest."""
    found: dict[tuple[float, int, str], float] = {}
    for row in (row for document in documents for row in document["results"]):
        name = row["engine"].split(",")[0]
        if name in ENGINES:
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
    names = [name for name in ENGINES if any(engine == name for _, _, engine in rows)]
    figure = Figure(figsize=(5.5 * len(scales), 3.6), layout="constrained")
    for axis, guidance in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        batches = sorted({batch for scale, batch, _ in rows if scale == guidance})
        for place, name in enumerate(names):
            heights = [rows.get((guidance, batch, name), float("nan")) for batch in batches]
            left = [at + (place - (len(names) - 1) / 2) * 0.8 / len(names) for at in range(len(batches))]
            axis.bar(left, heights, 0.8 / len(names), color=ENGINES[name], label=name)
        axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axis.set(xlabel="pictures at a time", ylabel="ms a token (less is better)", yscale="log",
                 title="guidance off" if guidance == 1 else "guidance on (two rows a picture)")
        axis.grid(axis="y", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """The last argument is the picture's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 2 or not arguments[-1].endswith(".png"):
        raise UserError("usage: python -m benchmarks.decode.chart DOCUMENT.json ... CHART.png")
    try:
        documents = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f"a document cannot be read ({one_line(error)})") from None
    draw(documents, Path(arguments[-1]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda rest: main(rest), sys.argv[1:], "benchmarks.decode.chart"))
