"""The command to run after `tokenloom data check`, made of what the check found."""

from __future__ import annotations

import math
import shlex
from typing import Any

RECIPES = (  # smallest shorter side of the median picture, recipe, resolution if not its own
    (112, "small_tokenizer", 128),
    (56, "small_tokenizer", None),
    (28, "shapes32_tokenizer", None),
    (0, "debug_tokenizer", None),
)
TOLERATED = 0.01  # as data.max_bad_fraction; ten always are

WAYS = {
    "path outside the folder": "links that you made are followed with --data.follow_links true",
    "no caption file": "captions in files of another ending are read with --data.caption_ending, "
                       "classes in folders with --data.format classes",
    "caption not UTF-8": "name the encoding of the captions with --data.encoding, such as cp1252",
    "too many pixels": "raise --data.max_pixels, or make the pictures smaller",
    "no caption": "name the column of the captions with --data.caption_column",
    "missing file": "unpack the pictures to where the list of them says",
}
"""What helps where nothing is usable, by the most frequent reason."""


def in_one_command(report: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Return the `tokenloom train` of checked images; None if none is usable, or if they stream.

    options: those of the check, by their names in a config.
    """
    if not report["usable"] or "streaming" in options:
        return None
    words = ["tokenloom", "train", report["path"], "--out", "my_model", "--minutes", "60"]
    if report["split"]:
        words += ["--split", report["split"]]
    return shlex.join([*words, *_data_words(report, options)])


def after_images(report: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the script that trains on checked images, or what to do if none is usable.

    options: as in `in_one_command`.
    """
    if not report["usable"]:
        ways = [WAYS[reason] for reason in report["unusable_by_reason"] if reason in WAYS]
        way_on = "; ".join([*report["hints"], *ways[:1]])
        return way_on or "repair what is listed above, and check again"

    side = report["shorter_side"]["median"]
    recipe, resolution = next((name, size) for least, name, size in RECIPES if side >= least)
    words = ["python", "training/train_tokenizer.py",
             "--config", f"training/recipes/{recipe}.yaml", "--data.path", report["path"]]
    if report["split"]:
        words += ["--data.split", report["split"]]
    elif "validation" in report["splits"] and len(report["splits"]) > 1:
        words += ["--data.validation_split", "validation"]
    words += _data_words(report, options)
    if resolution:
        words += ["--model.resolution", str(resolution)]
    return shlex.join([*words, "--run_dir", "runs/tokenizer"])


def _data_words(report: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Return the options that say how the data is read, and what share of it may be unusable."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--data.{name}", "true" if value is True else str(value)]
    bad = len(report["unusable"])
    if bad > max(10, TOLERATED * report["items"]):
        share = math.ceil(100 * bad / report["items"]) / 100
        words += ["--data.max_bad_fraction", f"{share:g}"]
    return words


def after_tokens(report: dict[str, Any]) -> str:
    """Return the command that trains on checked token shards, or what to do if none is whole."""
    if report["damaged"] or not report["usable"]:
        return "encode the data again with training/encode_dataset.py, which keeps whole shards"
    words = ["python", "training/train_seq2seq.py",
             "--config", "training/recipes/small_seq2seq.yaml", "--data.path", report["path"],
             "--image_tokenizer", "runs/tokenizer/model"]
    if report["split"]:
        words += ["--data.split", report["split"]]
    return shlex.join([*words, "--run_dir", "runs/seq2seq"])
