"""The working copy of the data: square images of the chosen size, some of them held out.

Reading small PNGs again and again takes a moment; decoding photographs in every epoch would take
most of the minutes.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_image.images import image_to_pixels
from tokenloom_common.errors import DataError
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.progress import progress
from training.autotrain.choices import Choices
from training.autotrain.plan import TrainOptions
from training.data.builders.dataset_folder import ShardWriter
from training.data.origin import data_origin, write_origin
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.data.sources.drops import DropCounter
from training.data.sources.open_dataset import open_dataset

TRAIN, HELD_OUT = "train", "held_out"
COPY_NAMES = ("data", "README.md", "ATTRIBUTION.md", "copy.json")


def write_copy(source: CaptionedImages, held_out: CaptionedImages | None, choices: Choices,
               folder: Path, options: TrainOptions, tick: Callable[[], None]) -> None:
    """Write the splits `train` and `held_out` to `folder`, which appears whole.

    held_out: the data's own split; None takes choices.held_out images out of `source`.
    options: its seed decides what is held out. tick: called for every image. DataError if too many
    images are unusable.
    """
    rows = list(range(len(source)))
    random.Random(options.seed).shuffle(rows)  # a folder may be sorted by what it shows
    rows = rows[:choices.copied]
    spared = 0 if held_out is not None else choices.held_out
    drops = DropCounter(str(source.path), options.max_bad_fraction)
    drops.record_opened(source)
    with atomic_folder(folder, COPY_NAMES) as aside:
        counts = {}
        parts = [(TRAIN, source, sorted(rows[spared:])), (HELD_OUT, source, sorted(rows[:spared]))]
        if held_out is not None:
            stride = -(-len(held_out) // choices.held_out)  # rounded up: no more than were chosen
            parts[1] = (HELD_OUT, held_out, list(range(0, len(held_out), stride)))
        for split, images, indices in parts:
            if indices:
                counts[split] = _write_split(aside, split, images, indices, choices.shape.size,
                                             drops, tick)
        if not counts.get(TRAIN):
            raise DataError(f"{source.path}: holds no usable item ({drops.summary()}); look with "
                            "`tokenloom data check`")
        write_origin(data_origin(str(source.path)), aside,
                     f"Its images at {choices.shape.size} px, for training.")
        write_json_atomic(aside / "copy.json", {"images": counts, "dropped": drops.summary()})


def _write_split(folder: Path, split: str, source: CaptionedImages, indices: list[int], size: int,
                 drops: DropCounter, tick: Callable[[], None]) -> int:
    writer = ShardWriter(folder, split, _features())
    count = 0
    for index in progress(indices, f"copy {split}", unit="image"):
        tick()
        try:
            item = source[index]
        except BAD_ITEM_ERRORS as error:
            drops.record(error.reason, source.key(index), seen_before=True)
            continue
        file = io.BytesIO()
        Image.fromarray(image_to_pixels(item.image, size)).save(file, "PNG", compress_level=1)
        content = file.getvalue()
        row = {"image": {"bytes": content, "path": None}, "captions": item.captions,
               "caption": item.captions[0], "key": item.key}
        writer.add(row, len(content))
        count += 1
    if count:
        writer.finish()
    return count


def _features() -> Any:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    return Features({"image": ImageFeature(), "captions": List(text), "caption": text, "key": text})


def open_copy(folder: Path, split: str) -> CaptionedImages | None:
    """Open a split of the working copy; None where it has none."""
    if not list((folder / "data").glob(f"{split}-*")):
        return None
    return open_dataset(folder, split=split)
