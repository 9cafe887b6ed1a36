"""Small copies of published data sets as people unpack them, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_images import encode, photo


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    return encode(photo(32, 32, seed), kind)


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_images(folder: Path, names: list[str], kind: str = "JPEG") -> None:
    for number, name in enumerate(names):
        put(folder / name, image_bytes(number, kind))


def coco(root: Path, splits: dict[str, int], year: int = 2017, images: str = "",
         annotations: str = "annotations") -> Path:
    """COCO with so many images per split, two captions each."""
    for split, count in splits.items():
        names = [f"{split}_{number:012d}.jpg" for number in range(count)]
        write_images(root / images / f"{split}{year}", names)
        notes = [{"id": 2 * number + k, "image_id": number, "caption": f"{split} {number} view {k}"}
                 for k in range(2) for number in range(count)]
        listed = [{"id": number, "file_name": name, "license": 4} for number, name in enumerate(names)]
        document = {"images": listed, "annotations": notes, "licenses": [{"id": 4, "name": "CC BY"}]}
        put(root / annotations / f"captions_{split}{year}.json", json.dumps(document))
    return root


def karpathy(root: Path, name: str, splits: list[str], folder: str | None = None) -> Path:
    """Karpathy's file `name`, image k in splits[k]; images are below `folder`, or named without one."""
    names = [f"{number}.jpg" for number in range(len(splits))]
    write_images(root / (folder or "images"), names)
    images = [{"filename": image, "split": split, "imgid": number,
               "sentences": [{"raw": f"{split} {number}"}, {"raw": "another"}],
               **({"filepath": folder} if folder else {})}
              for number, (image, split) in enumerate(zip(names, splits, strict=True))]
    put(root / name, json.dumps({"images": images, "dataset": "any"}))
    return root


def flickr(root: Path, name: str, text: str, images: int = 3, folder: str = "flickr30k_images") -> Path:
    """Images 0.jpg, 1.jpg ... and a table of captions."""
    write_images(root / folder, [f"{number}.jpg" for number in range(images)])
    put(root / name, text)
    return root


def results_csv(images: int = 3) -> str:
    """Flickr30k's results.csv, with the line that has no bar before its caption."""
    rows = [f"{number}.jpg| {k}| view {k} of {number} ." for number in range(images) for k in range(2)]
    rows[-1] = rows[-1].replace("| 1| ", "| 1   ")
    return "\n".join(["image_name| comment_number| comment", *rows]) + "\n"


def diffusiondb(root: Path, parts: int = 2, with_json: bool = True, with_metadata: bool = True,
                folder: str = "images", ending: str = ".png") -> Path:
    """DiffusionDB with two images in each part."""
    table: dict[str, list] = {"image_name": [], "prompt": [], "part_id": [], "seed": [], "step": [], "cfg": []}
    for part in range(1, parts + 1):
        name = f"part-{part:06d}"
        names = [f"{part}{number}-abcd{ending}" for number in range(2)]
        write_images(root / folder / name, names, "WEBP" if ending == ".webp" else "PNG")
        prompts = {image: {"p": f"prompt of {image}", "se": 7, "c": 7.5, "st": 50, "sa": "k_lms"}
                   for image in names}
        if with_json:
            put(root / folder / name / f"{name}.json", json.dumps(prompts))
        for image in names:
            for column, value in zip(table, (image, f"prompt of {image}", part, 7, 50, 7.5), strict=True):
                table[column].append(value)
    if with_metadata:
        pq.write_table(pa.table(table), root / "metadata.parquet")
    return root
