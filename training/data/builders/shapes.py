"""Build a synthetic set of coloured shapes, with captions that an image can be checked against.

`unseen_combination` holds scenes with a colour on a shape that `train` never shows together, though
it shows both.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from tokenloom_common.errors import UserError
from tokenloom_common.extras import require_extra
from tokenloom_common.files import atomic_folder
from tokenloom_common.progress import progress
from training.data.builders.dataset_folder import (
    OWN_NAMES,
    card_head,
    previous_build,
    write_record,
    write_splits,
)
from training.data.builders.scenes import (
    COLORS,
    COMBINATIONS,
    SHAPES,
    Combination,
    Scene,
    describe,
    draw_scene,
    make_scene,
)

log = logging.getLogger(__name__)

MIN_SIZE, MAX_SIZE, MAX_OBJECTS = 16, 512, 4
UNSEEN_SHARE = 0.1  # of the scenes
UNSEEN_COMBINATIONS = 4  # of 42 pairs of colour and shape, at most the number of shapes
SCENE_BYTES = 200  # picture and captions in a parquet file take at least so much
ATTEMPTS = 100  # at a scene that no earlier one equals


def build_shapes(out: str | Path, size: int = 32, num_scenes: int = 2000, seed: int = 0,
                 max_objects: int = 2) -> dict[str, Any]:
    """Build the set at `out` and return the contents of build.json, and `reused`.

    reused: True if the same set was there already.
    UserError for arguments out of range, or if `out` holds something else.
    """
    _check_arguments(size, num_scenes, max_objects)
    arguments = {"size": size, "num_scenes": num_scenes, "seed": seed, "max_objects": max_objects}
    earlier = previous_build(out, "shapes", arguments, num_scenes * SCENE_BYTES)
    if earlier is not None:
        log.info("%s: already built with these arguments", out)
        return {**earlier, "reused": True}
    out = Path(out)
    require_extra("datasets", "building a dataset of shapes")

    started = time.monotonic()
    unseen = choose_unseen(seed)
    splits = make_splits(size, num_scenes, seed, max_objects, unseen)

    report = {"pairs": {name: len(rows) for name, rows in splits.items()},
              "unseen_combinations": [" ".join(combination) for combination in unseen],
              "seconds": round(time.monotonic() - started, 1)}
    with atomic_folder(out, tuple(OWN_NAMES)) as folder:
        files = write_splits(folder, splits, _features())
        card = _card(files, report, arguments)
        (folder / "README.md").write_text(card, encoding="utf-8")
        record = write_record(folder, "shapes", arguments, files, report)
    return {**record, "reused": False}


def _check_arguments(size: int, num_scenes: int, max_objects: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size}: must lie in {MIN_SIZE} to {MAX_SIZE} pixels")
    if not 10 <= num_scenes <= 1_000_000:
        raise UserError(f"num_scenes {num_scenes}: must lie in 10 to 1,000,000")
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise UserError(f"max_objects {max_objects}: must lie in 1 to {MAX_OBJECTS}")


def choose_unseen(seed: int) -> list[Combination]:
    """Choose the held-out pairs of colour and shape.

    No two share a colour or a shape, so that `train` shows each of these in other pairs.
    """
    generator = random.Random(f"{seed} unseen")
    colors = generator.sample(list(COLORS), UNSEEN_COMBINATIONS)
    shapes = generator.sample(SHAPES, UNSEEN_COMBINATIONS)
    return sorted(zip(colors, shapes, strict=True))


def make_splits(size: int, num_scenes: int, seed: int, max_objects: int,
                unseen: list[Combination]) -> dict[str, list[dict[str, Any]]]:
    """Make the rows of each split; no image occurs twice.

    Each attempt at scene k has a generator of its own, seeded with (seed, k, attempt).
    """
    seen_combinations = [combination for combination in COMBINATIONS if combination not in unseen]
    num_unseen = round(UNSEEN_SHARE * num_scenes)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "unseen_combination": []}
    digests: set[bytes] = set()
    for index in progress(range(num_scenes), "drawing shapes", unit="image"):
        split, allowed, required = "train", seen_combinations, None
        if index < num_unseen:
            split, allowed, required = "unseen_combination", COMBINATIONS, unseen

        for attempt in range(ATTEMPTS):
            generator = random.Random(f"{seed} scene {index} {attempt}")
            scene = make_scene(generator, allowed, max_objects, required)
            pixels = draw_scene(scene, size)
            digest = hashlib.sha256(pixels.tobytes()).digest()
            # compared as pixels: different scenes may be drawn alike at a small size
            if digest not in digests:
                break
        else:
            raise UserError(f"num_scenes {num_scenes:,}: more than there are different pictures; "
                            "use a larger size")

        digests.add(digest)
        splits[split].append(_row(scene, pixels, f"{index:07d}"))
    return splits


def _row(scene: Scene, pixels: Any, key: str) -> dict[str, Any]:
    png = BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    captions = describe(scene)
    return {"image": {"bytes": png.getvalue(), "path": f"{key}.png"}, "captions": captions,
            "caption": captions[0], **scene.plain(), "key": key}


def _features() -> Any:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    number = Value("float32")
    thing = {"shape": text, "color": text, "x": number, "y": number, "size": number}
    return Features({"image": ImageFeature(), "captions": List(text), "caption": text,
                     "objects": List(thing), "relation": text, "count": Value("uint8"),
                     "layout": List(Value("uint8")), "key": text})


def _card(files: list[str], report: dict[str, Any], arguments: dict[str, Any]) -> str:
    size = arguments["size"]
    rows = "\n".join(f"| {name} | {count:,} |" for name, count in report["pairs"].items())
    unseen = ", ".join(report["unseen_combinations"])
    colors = ", ".join(COLORS)
    shapes = ", ".join(SHAPES)
    return f"""{card_head("cc0-1.0", files)}
# Coloured shapes with captions

Scenes of {size} x {size} pixels, made by `tokenloom data shapes` (seed {arguments["seed"]}).

| split | scenes |
|---|---|
{rows}

`unseen_combination` has at least one of: {unseen}. `train` has none of these.

Columns: `captions` (all true), `caption` (the first of them), `objects` (shape, color, centre x \
and y and diameter as
shares of the canvas, y downwards), `relation` (of the first object to the second, "" for none), \
`count`, and `layout`:
a 16 x 16 grid in raster order, 0 for background, else 1 + {len(SHAPES)} * colour + shape, \
numbered in the order
{colors} and {shapes}.
"""
