"""The document of `benchmarks decode`: rows of results, and the tables that show them."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import command_line
from benchmarks.harness import Timing

RATIOS = {"ratio_vs_xtransformers": "x-transformers", "ratio_vs_transformers": "transformers",
          "ratio_vs_min_dalle": "min-dalle"}
"""Key of the document -> the peer that its ratios are against, in its fastest variant."""
SHOWN = ("engine", "batch", "guidance", "ms_per_token", "quartile1_s", "quartile3_s",
         "tokens_per_step", "fraction_of_limit")


def fastest_variant(timed: dict[str, Timing], peer: str) -> str | None:
    """The fastest variant of a peer, for example one of its caches; None if none was timed."""
    variants = [name for name in timed if name.split(",")[0] == peer]
    return min(variants, key=lambda name: statistics.median(timed[name].seconds), default=None)


def label(row: dict[str, Any]) -> str:
    """Name of a row in the document's summaries."""
    guidance = "off" if row["guidance"] == 1 else "on"
    return f"{row['engine']}, batch {row['batch']}, guidance {guidance}"


def summaries(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and fractions of the limit by label, picked out of the rows."""
    found: dict[str, Any] = {}
    for key in RATIOS:
        found[key] = {label(row): row["ratios"][key] for row in results if key in row["ratios"]}
    found["fraction_of_limit"] = {label(row): row["fraction_of_limit"] for row in results
                                  if row["fraction_of_limit"] is not None}
    return found


def show(document: dict[str, Any]) -> None:
    """Print the tables for people."""
    shown = []
    for row in document["results"]:
        cells = {key: row[key] for key in SHOWN}
        for key in RATIOS:
            cells[key.removeprefix("ratio_vs_")] = row["ratios"].get(key)
        shown.append(cells)
    if shown:
        print("image tokens, from text ids on (ratios above 1: ours is faster; fraction_of_limit: "
              "the machine's least time / ours)")
        print(command_line.table(shown) + "\n")
    if document["memory"]:
        print("memory beyond the weights (MiB)\n" + command_line.table(document["memory"]) + "\n")

    limits = document["limits"]
    print(f"this machine reads {limits['weight_streaming_gb_per_s']} GB/s and multiplies "
          f"{limits['matmul_gflop_per_s']} GFLOP/s")
    for note in document["notes"]:
        print(f"note: {note}")
    for name, facts in document["peers"].items():
        if "missing" in facts:
            print(f"not measured: {name} ({facts['missing']})")
