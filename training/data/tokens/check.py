"""Check token shards before a run: file hashes, codebook usage, caption lengths."""

# Axes: K codebook size

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy

from tokenloom_common.errors import UserError, nearest_name
from tokenloom_common.progress import progress
from training.data.tokens.shards import INDEX_NAME, TokenShards, read_index


def is_token_folder(path: str | Path) -> bool:
    """Whether a folder holds token shards."""
    return (Path(path) / INDEX_NAME).is_file()


def check_tokens(path: str | Path, split: str | None = None) -> dict[str, Any]:
    """Read every token of one split, or of all, and return a report.

    `damaged` lists the damaged splits with a reason; `usable` counts the rows of all others.
    UserError for an unknown split and for an index that cannot be read.
    """
    index = read_index(path)
    if split is None:
        names = [name for name, entry in index.splits.items() if entry.rows]
    elif split in index.splits:
        names = [split]
    else:
        raise UserError(f"{path}: no split '{split}'{nearest_name(split, index.splits)}")

    splits: dict[str, Any] = {}
    damaged: list[dict[str, str]] = []
    for name in progress(names, "checking", unit="split"):
        try:
            splits[name] = _split_facts(TokenShards(path, name))
        except UserError as error:  # go on: the report names every damaged split
            damaged.append({"split": name, "reason": str(error)})

    items = sum(index.splits[name].rows for name in names)
    usable = sum(facts["rows"] for facts in splits.values())
    layout = None if index.layout is None else index.layout.plain()
    return {"path": str(path), "split": split,
            "tokenizer_fingerprint": index.tokenizer_fingerprint,
            "codebook_size": index.codebook_size, "grid": list(index.grid), "views": index.views,
            "layout": layout, "dropped": index.dropped, "items": items, "usable": usable,
            "splits": splits, "damaged": damaged}


def _split_facts(shards: TokenShards) -> dict[str, Any]:
    shards.check()  # a large split is not checked when it is opened

    lengths = [len(caption) for caption in shards.all_captions()]
    characters = {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}

    counts = shards.token_counts()  # [K]
    used = counts > 0
    share = counts[used] / counts.sum()  # unused codes left out: 0 * log 0 would be NaN
    entropy = -(share * numpy.log(share)).sum()  # in nats

    files = shards.index.splits[shards.split].files
    return {"rows": len(shards), "files": len(files),
            "captions": len(lengths), "caption_characters": characters,
            "codebook_usage": float(used.mean()),
            "codebook_perplexity": float(numpy.exp(entropy))}


def format_token_report(report: dict[str, Any]) -> str:
    """Format the report of `check_tokens` for a person."""
    rows, columns = report["grid"]
    views = len(report["views"])
    lines = [f"{report['path']}: token shards, {rows} x {columns} codes of "
             f"{report['codebook_size']:,}, {views} view(s) per picture"]

    for name, facts in report["splits"].items():
        length = facts["caption_characters"]
        usage = 100 * facts["codebook_usage"]
        lines.append(f"  {name}: {facts['rows']:,} rows in {facts['files']:,} whole file(s), "
                     f"{facts['captions']:,} captions of {length['min']:,} to {length['max']:,} "
                     f"characters (median {length['median']:,.10g}); {usage:.1f} % of the codes "
                     f"in use, perplexity {facts['codebook_perplexity']:,.1f}")

    for entry in report["damaged"]:
        lines.append(f"  {entry['split']}: damaged: {entry['reason']}")
    if report["dropped"]:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        lines.append(f"dropped when they were made: {dropped}")
    return "\n".join(lines)
