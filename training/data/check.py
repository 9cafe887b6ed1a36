"""Check captioned images before training: number, sizes, captions, duplicates, unusable items."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError
from tokenloom_common.progress import progress
from training.data.sources.captioned_images import (
    BAD_ITEM_ERRORS,
    CaptionedImage,
    CaptionedImages,
)
from training.data.sources.drops import DOWNLOAD_FAILED, BadItem
from training.data.sources.left_out import DOWNLOADS_FAILED
from training.data.sources.locate import FileLayout, find_files
from training.data.sources.open_dataset import load_source
from training.data.sources.options import ReadOptions
from training.data.sources.tables.table import hub_split_sizes

LISTED_ITEMS = 20  # unusable items that the report for a person names
FREQUENT_CAPTIONS = 5


class Totals:
    """Counts over the usable items of a source."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.heights: list[int] = []
        self.shorter_sides: list[int] = []
        self.caption_lengths: list[int] = []
        self.captions_per_image: list[int] = []
        self.captions: Counter[str] = Counter()
        self.keys_by_content: dict[str, list[str]] = {}

    def add(self, item: CaptionedImage) -> None:
        """Count one item."""
        width, height = item.image.size
        self.widths.append(width)
        self.heights.append(height)
        self.shorter_sides.append(min(width, height))
        self.captions_per_image.append(len(item.captions))
        self.caption_lengths += [len(caption) for caption in item.captions]
        self.captions.update(item.captions)

        # a hash of each image, not its pixels: all images together would not fit into memory
        # the size too: images of 2 x 8 and 4 x 4 pixels may have equal bytes
        content = f"{item.image.size}".encode() + item.image.tobytes()
        digest = hashlib.sha256(content).hexdigest()
        self.keys_by_content.setdefault(digest, []).append(item.key)


def check_data(path: str | Path, *, split: str | None = None, **options: Any) -> dict[str, Any]:
    """Decode every image once and report; `usable` 0 means that nothing can be trained on.

    Arguments and errors as of `open_dataset`, but unusable items are reported.
    """
    layout = find_files(path, ReadOptions(**options))
    data = load_source(path, split=split, **options)
    bad = list(data.bad_items)
    left_out = Counter(data.left_out)
    totals = Totals()
    for index in progress(range(len(data)), "checking", unit="image"):
        try:
            item = data[index]
        except BAD_ITEM_ERRORS as error:
            if error.reason == DOWNLOAD_FAILED:
                left_out[DOWNLOADS_FAILED] += 1
                continue
            # no DropCounter, which would stop at a limit: the report names them all
            bad.append(BadItem(data.key(index), error.reason))
            continue
        totals.add(item)
    report = _report(totals, data, bad)
    return {"path": str(path), "split": split, "format": layout.format,
            "reason": layout.reason,
            "splits": _split_sizes(path, layout, split, report["items"], options), **report,
            "left_out": dict(left_out)}


def _split_sizes(path: str | Path, layout: FileLayout, split: str | None, items: int,
                 options: dict[str, Any]) -> dict[str, int | None]:
    """Return the number of items of each split; None where it is not known.

    items: those of the split that was checked.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes: dict[str, int | None]
    if layout.format == "hub":
        sizes = hub_split_sizes(str(path))
    else:
        sizes = dict.fromkeys(layout.splits)
    checked = split or ("train" if "train" in sizes else next(iter(sizes)))
    sizes[checked] = items
    for name, files in layout.splits.items():
        if name == checked:
            continue
        try:
            if layout.format == "parquet":
                sizes[name] = sum(pq.read_metadata(file).num_rows for file in files)
            else:
                other = load_source(path, split=name, **options)
                sizes[name] = len(other) + len(other.bad_items)
        except (UserError, OSError, pa.ArrowException):
            sizes[name] = None  # damaged, which its own check will say
    return sizes


def _report(totals: Totals, data: CaptionedImages, bad: list[BadItem]) -> dict[str, Any]:
    usable = len(totals.widths)
    captions = totals.captions
    duplicates = [keys for keys in totals.keys_by_content.values() if len(keys) > 1]
    frequent = [[caption, count] for caption, count in captions.most_common(FREQUENT_CAPTIONS)
                if count > 1]
    reasons = Counter(item.reason for item in bad)
    return {
        "items": usable + len(bad),
        "usable": usable,
        "width": _range(totals.widths),
        "height": _range(totals.heights),
        "shorter_side": _range(totals.shorter_sides),
        "captions": len(totals.caption_lengths),
        "captions_per_image": _range(totals.captions_per_image),
        "caption_characters": _range(totals.caption_lengths),
        "caption_repairs": dict(data.caption_repairs),
        "encodings": dict(data.encodings),
        "columns": data.columns,
        "duplicate_pictures": sum(len(keys) - 1 for keys in duplicates),
        "duplicate_picture_groups": duplicates,
        "duplicate_captions": captions.total() - len(captions),
        "most_frequent_captions": frequent,
        "hints": data.hints,
        "unusable_by_reason": dict(reasons.most_common()),
        "unusable": [item._asdict() for item in bad],
    }


def _range(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def format_report(report: dict[str, Any]) -> str:
    """Format the report as lines for a person."""
    split = f" (split {report['split']})" if report["split"] else ""
    sizes = [f"{name} {'(size not known)' if size is None else f'{size:,}'}"
             for name, size in report["splits"].items()]
    lines = [f"{report['path']}{split}",
             f"read as            {report['reason']}",
             f"splits             {', '.join(sizes)}",
             f"usable images      {report['usable']:,} of {report['items']:,}"]
    if report["usable"]:
        lines += _usable_lines(report)
    if report["columns"]:
        lines.append(f"other columns      {', '.join(report['columns'])}")
    if report["caption_repairs"]:
        lines.append(f"captions repaired  {_format_counts(report['caption_repairs'])}")
    if report["encodings"]:
        found = [f"{name} {count:,}" for name, count in report["encodings"].items()]
        lines.append(f"encodings          {', '.join(found)}")
    lines += [f"{name:<18} {count:,}" for name, count in report["left_out"].items()]
    return "\n".join([*lines, *_unusable_lines(report)])


def _usable_lines(report: dict[str, Any]) -> list[str]:
    captions = f"{report['captions']:,}, per image {_format_range(report['captions_per_image'])}"
    duplicate_images = f"{report['duplicate_pictures']:,}"
    if report["duplicate_picture_groups"]:
        # a group has two keys or more
        first, second = report["duplicate_picture_groups"][0][:2]
        duplicate_images += f" (such as {first} = {second})"
    duplicate_captions = f"{report['duplicate_captions']:,}"
    if report["most_frequent_captions"]:
        caption, count = report["most_frequent_captions"][0]
        duplicate_captions += f" (most frequent: '{caption[:60]}', {count:,} times)"
    return [f"width              {_format_range(report['width'])} pixels",
            f"height             {_format_range(report['height'])} pixels",
            f"captions           {captions}",
            f"caption length     {_format_range(report['caption_characters'])} characters",
            f"duplicate pictures {duplicate_images}",
            f"duplicate captions {duplicate_captions}"]


def _unusable_lines(report: dict[str, Any]) -> list[str]:
    unusable = report["unusable"]
    if not unusable:
        return ["unusable           0"]
    reasons = _format_counts(report["unusable_by_reason"])
    lines = [f"unusable           {len(unusable):,} ({reasons})"]
    lines += [f"  {item['key']}: {item['reason']}" for item in unusable[:LISTED_ITEMS]]
    if len(unusable) > LISTED_ITEMS:
        more = len(unusable) - LISTED_ITEMS
        lines.append(f"  and {more:,} more (all of them with --json FILE)")
    return lines


def _format_range(values: dict[str, float]) -> str:
    if values["min"] == values["max"]:
        return f"{values['min']:,}"
    # .10g: a median of integers may end in .5, and 3.0 must read 3
    return f"{values['min']:,} to {values['max']:,}, median {values['median']:,.10g}"


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
