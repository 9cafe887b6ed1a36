"""Options that say how data is read, the same in every command that reads captioned images.

Each has the name that it has in a config, too: an option that a message names can be pasted.
"""

from __future__ import annotations

import argparse
from typing import Any

from tokenloom_common.errors import UserError
from training.data.sources.options import ReadOptions

MAX_PIXELS = 1_000_000_000  # as in a config

VALUES = {
    "format": ("NAME", "how to read a folder that could be read in several ways: metadata, "
               "sidecar, classes, parquet, tar or saved"),
    "caption_column": ("NAME", "column of the captions (default: text, captions, caption, prompt)"),
    "image_column": ("NAME", "column of the pictures (default: found by name)"),
    "caption_ending": (".END", "ending of the caption files beside pictures (default: .txt or "
                       ".caption)"),
    "encoding": ("NAME", "of captions without a byte order mark, such as cp1252 (default: UTF-8)"),
    "max_pixels": ("N", "of a picture; a larger JPEG is read smaller, others are unusable"),
}
FLAGS = {
    "follow_links": "follow links that lead out of the folder",
    "streaming": "read parquet and tar shards where they lie, without a copy in the cache of "
                 "`datasets`",
}


def add_reading_options(parser: argparse.ArgumentParser, streaming: bool = False) -> None:
    """Add the options; `streaming` only for a command that reads every row in order."""
    group = parser.add_argument_group(
        "how the data is read", "each also as in a config: --data.format, --data.max_pixels")
    for name, (metavar, text) in VALUES.items():
        kind = _pixels if name == "max_pixels" else str
        group.add_argument(_dashed(name), dest=name, metavar=metavar, type=kind, help=text)
        for spelling in _other_spellings(name):
            group.add_argument(spelling, dest=name, type=kind, help=argparse.SUPPRESS)
    for name, text in FLAGS.items():
        if name == "streaming" and not streaming:
            continue
        group.add_argument(_dashed(name), dest=name, action="store_true", help=text)
        for spelling in _other_spellings(name):
            # with a value, as configs have it: `--follow-links DIR` must not take DIR for one
            group.add_argument(spelling, dest=name, nargs="?", const=True, type=_truth,
                               help=argparse.SUPPRESS)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _other_spellings(name: str) -> list[str]:
    spellings = (f"--{name}", f"--data.{name}", f"--data.{name.replace('_', '-')}")
    return [spelling for spelling in dict.fromkeys(spellings) if spelling != _dashed(name)]


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}': give true or false")
    return text.lower() == "true"


def _pixels(text: str) -> int:
    try:
        number = int(text.replace(",", ""))
    except ValueError:
        number = 0
    if not 1 <= number <= MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"'{text}': give a number from 1 to {MAX_PIXELS:,}")
    return number


def given_reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, by their names in a config, to hand to open_dataset."""
    names = [*VALUES, "follow_links"]
    values = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in values.items() if value not in (None, False)}
    try:
        ReadOptions(**given).check()
    except UserError as error:
        raise UserError(f"--{error}" if str(error).startswith("data.") else str(error)) from None
    return given
