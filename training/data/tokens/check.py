"""Look at token shards before training: every file's hash, how much of the codebook they use, how long captions are."""

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
    """Read every token once and report; `damaged` lists what is wrong with a split, `usable` counts rows of whole ones.

    UserError for an unknown split and for an index that cannot be read.
    """
    index = read_index(path)
    if split is not None and split not in index.splits:
        raise UserError(f"{path}: no split '{split}'{nearest_name(split, index.splits)}")
    names = [split] if split is not None else [name for name, entry in index.splits.items() if entry.rows]
    splits: dict[str, Any] = {}
    damaged: list[dict[str, str]] = []
    for name in progress(names, "checking", unit="split"):
        try:
            splits[name] = _facts(TokenShards(path, name))
        except UserError as error:
            damaged.append({"split": name, "reason": str(error)})
    return {"path": str(path), "split": split, "tokenizer_fingerprint": index.tokenizer_fingerprint,
            "codebook_size": index.codebook_size, "grid": list(index.grid), "views": index.views,
            "layout": index.layout and index.layout.plain(), "dropped": index.dropped,
            "items": sum(index.splits[name].rows for name in names),
            "usable": sum(facts["rows"] for facts in splits.values()), "splits": splits, "damaged": damaged}


def _facts(shards: TokenShards) -> dict[str, Any]:
    shards.check()
    counts = shards.token_counts()
    lengths = [len(caption) for caption in shards.all_captions()]
    share = counts[counts > 0] / counts.sum()
    return {"rows": len(shards), "files": len(shards.index.splits[shards.split].files), "captions": len(lengths),
            "caption_characters": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
            "codebook_usage": float((counts > 0).mean()),
            "codebook_perplexity": float(numpy.exp(-(share * numpy.log(share)).sum()))}


def format_token_report(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    rows, columns = report["grid"]
    lines = [f"{report['path']}: token shards, {rows} x {columns} codes of {report['codebook_size']:,}, "
             f"{len(report['views'])} view(s) a picture"]
    for name, facts in report["splits"].items():
        length = facts["caption_characters"]
        lines.append(f"  {name}: {facts['rows']:,} rows in {facts['files']:,} whole file(s), {facts['captions']:,} captions of "
                     f"{length['min']:,} to {length['max']:,} characters (median {length['median']:,.10g}); "
                     f"{100 * facts['codebook_usage']:.1f} % of the codes in use, perplexity "
                     f"{facts['codebook_perplexity']:,.1f}")
    lines += [f"  {one['split']}: damaged: {one['reason']}" for one in report["damaged"]]
    if report["dropped"]:
        passed = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        lines.append(f"passed over when they were made: {passed}")
    return "\n".join(lines)
