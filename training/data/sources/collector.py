"""Collect the items that a reader of folders or tar shards finds, and make a table of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenloom_common.text_files import TextDecodeError
from training.data.sources.captions import class_names, clean_captions, unusable_reason
from training.data.sources.drops import BadItem
from training.data.sources.options import ReadOptions

# `image` is the hub's usual name; jpg, png and webp are what webdatasets call their images
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
CAPTION_COLUMNS = ("text", "captions", "caption", "prompt")
CLASS_COLUMNS = ("label", "labels", "class", "cls", "category", "fine_label")
"""Columns of classes, whose names or numbers are the captions where there are no others."""
URL_COLUMNS = ("url", "image_url", "img_url")
DOWNLOAD_FIRST = "lists URLs, not images: download them first, with img2dataset for example"
MAX_HINTS = 2
SHOWN_NAMES = 20
MAX_TEXT_BYTES = 1 << 20  # of one caption file or one line of metadata


class Collector:
    """Usable items as rows, the others with their reason."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.bad: list[BadItem] = []
        self.repairs: Counter = Counter()
        self.columns: set[str] = set()
        self.encodings: Counter[str] = Counter()  # files of captions by their encoding
        self.hints: dict[str, None] = {}  # why items are unusable and what helps, in order
        self.left_out: Counter[str] = Counter()  # of tars: failed downloads
        self.folders: dict[str, str] = {}  # in tars, and the first shard with each

    def hint(self, text: str) -> None:
        """Keep what helps where nothing is usable: the first of each kind is enough."""
        if len(self.hints) < MAX_HINTS:
            self.hints[text] = None

    def drop(self, key: str, reason: str) -> None:
        """Count one unusable item."""
        self.bad.append(BadItem(key, reason))

    def drop_undecoded(self, key: str, name: str, error: TextDecodeError) -> None:
        """Count one item whose captions, in the file of this name, are in another encoding."""
        self.drop(key, f"caption {error}")
        self.hint(f"{name} is {error}; save captions as UTF-8, or say what they are with "
                  "--data.encoding")

    def parse_record(self, text: str) -> dict[str, Any]:
        """Parse the JSON beside an image; a broken one is counted: a text may lie there too."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            return record
        self.repairs["broken json beside a picture"] += 1
        return {}

    def add(self, key: str, captions: object, metadata: dict[str, Any], **reference: Any) -> None:
        """Add one item whose image is at `reference`; drop it if no caption is usable."""
        usable = clean_captions(captions, self.repairs)
        if not usable:
            self.drop(key, unusable_reason(captions))
            return
        self.columns |= metadata.keys()
        # a table holds no lone surrogates: json escapes them as \u, a key gets ? in their place
        self.rows.append({"key": key.encode("utf-8", "replace").decode(), "captions": usable,
                          "metadata": json.dumps(metadata), **reference})

    def to_dataset(self, in_tar: bool) -> Any:
        """Return the rows as a `datasets.Dataset` in memory, which says where each image is."""
        from datasets import Dataset, Features, List, Value
        from datasets import Image as ImageFeature

        if in_tar:
            image = {"shard": Value("string"), "offset": Value("int64"), "size": Value("int64")}
        else:
            image = {"image": ImageFeature(decode=False)}
        features = Features({"key": Value("string"), "captions": List(Value("string")),
                             "metadata": Value("string"), **image})
        # with features: an empty list of rows would make columns of type null
        columns = {name: [row[name] for row in self.rows] for name in features}
        return Dataset.from_dict(columns, features=features)


def find_name(columns: Collection[str], chosen: str | None, usual: Sequence[str]) -> str | None:
    """Return the chosen column, or the first usual one, in any case; None if it is not there."""
    if chosen in columns:
        return chosen
    in_lower_case = {name.strip().lower(): name for name in reversed(list(columns))}
    if chosen is not None:
        usual = [chosen.strip().lower()]
    return next((in_lower_case[name] for name in usual if name in in_lower_case), None)


def shown_names(names: Collection[str]) -> str:
    """Format the names of columns; of very many, as a list taken for a table has, the first."""
    shown = ", ".join(list(names)[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{shown} and {more:,} more" if more > 0 else shown


def lists_urls(columns: Collection[str]) -> bool:
    """Whether columns hold URLs of images; a list without names of columns begins with one."""
    return any(name.strip().lower() in URL_COLUMNS or "://" in name for name in columns)


def pick_captions(record: Mapping[str, Any], options: ReadOptions) -> str | None:
    """Return the column of a record with the captions: CAPTION_COLUMNS, or else a class."""
    return find_name(record, options.caption_column, CAPTION_COLUMNS + CLASS_COLUMNS)


def pop_captions(record: dict[str, Any], options: ReadOptions) -> object:
    """Take the captions out of a record; None if it has none."""
    name = pick_captions(record, options)
    if name is None:
        return None
    return class_names(record.pop(name))  # popped: what is left of the record is the metadata
