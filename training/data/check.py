"""Look at captioned images before training: how many, what sizes, which captions, what is doubled, what is unusable."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.progress import progress
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import BadItem
from training.data.sources.open_dataset import load_source

SHOWN = 20  # unusable items listed by name


def check_data(path: str | Path, *, split: str | None = None, caption_column: str | None = None,
               image_column: str | None = None, streaming: bool = False) -> dict[str, Any]:
    """Decode every picture once and report; `usable` 0 means that nothing can be trained on.

    UserError, MissingFileError and DataError as from `open_dataset`, except that unusable items are reported.
    """
    data = load_source(path, split=split, caption_column=caption_column, image_column=image_column,
                       streamed_rows=int(streaming))
    bad = list(data.bad_items)
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    per_image: list[int] = []
    captions: Counter = Counter()
    pictures: dict[str, list[str]] = {}
    for index in progress(range(len(data)), "checking", unit="image"):
        item = _get(data, index, bad)
        if item is None:
            continue
        sizes.append(item.image.size)
        per_image.append(len(item.captions))
        lengths += map(len, item.captions)
        captions.update(item.captions)
        content = f"{item.image.size}".encode() + item.image.tobytes()
        pictures.setdefault(hashlib.sha256(content).hexdigest(), []).append(item.key)
    groups = [keys for keys in pictures.values() if len(keys) > 1]
    return {"path": str(path), "split": split, "items": len(sizes) + len(bad), "usable": len(sizes),
            "width": _range([width for width, _ in sizes]), "height": _range([height for _, height in sizes]),
            "captions": len(lengths), "captions_per_image": _range(per_image), "caption_characters": _range(lengths),
            "caption_repairs": dict(data.caption_repairs), "columns": data.columns,
            "duplicate_pictures": sum(len(keys) - 1 for keys in groups), "duplicate_picture_groups": groups,
            "duplicate_captions": sum(captions.values()) - len(captions),
            "most_frequent_captions": [[text, count] for text, count in captions.most_common(5) if count > 1],
            "unusable_by_reason": dict(Counter(item.reason for item in bad).most_common()),
            "unusable": [item._asdict() for item in bad]}


def _get(data: CaptionedImages, index: int, bad: list[BadItem]) -> Any:
    try:
        return data[index]
    except BAD_ITEM_ERRORS as error:
        bad.append(BadItem(data.key(index), error.reason))
        return None


def _range(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def format_report(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"{report['path']}" + (f" (split {report['split']})" if report["split"] else ""),
             f"usable images      {report['usable']:,} of {report['items']:,}"]
    if report["usable"]:
        lines += [f"width              {_words(report['width'])} pixels",
                  f"height             {_words(report['height'])} pixels",
                  f"captions           {report['captions']:,}, per image {_words(report['captions_per_image'])}",
                  f"caption length     {_words(report['caption_characters'])} characters",
                  f"duplicate pictures {_duplicates(report)}",
                  f"duplicate captions {report['duplicate_captions']:,}" + _frequent(report)]
    if report["columns"]:
        lines.append(f"other columns      {', '.join(report['columns'])}")
    if report["caption_repairs"]:
        lines.append(f"captions repaired  {_reasons(report['caption_repairs'])}")
    unusable = report["unusable"]
    if unusable:
        lines.append(f"unusable           {len(unusable):,} ({_reasons(report['unusable_by_reason'])})")
        lines += [f"  {item['key']}: {item['reason']}" for item in unusable[:SHOWN]]
        if len(unusable) > SHOWN:
            lines.append(f"  and {len(unusable) - SHOWN:,} more (all of them with --json FILE)")
    else:
        lines.append("unusable           0")
    return "\n".join(lines)


def _words(values: dict[str, float]) -> str:
    if values["min"] == values["max"]:
        return f"{values['min']:,}"
    return f"{values['min']:,} to {values['max']:,}, median {values['median']:,.10g}"


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def _duplicates(report: dict[str, Any]) -> str:
    groups = report["duplicate_picture_groups"]
    example = f" (such as {groups[0][0]} = {groups[0][1]})" if groups else ""
    return f"{report['duplicate_pictures']:,}{example}"


def _frequent(report: dict[str, Any]) -> str:
    frequent = report["most_frequent_captions"]
    return f" (most frequent: '{frequent[0][0][:60]}', {frequent[0][1]:,} times)" if frequent else ""
