"""DiffusionDB: prompts in the JSON of each part, or in one parquet table of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenloom_common.errors import DataError, one_line
from training.data.builders.imports.annotations import AnnotatedFolder, Item
from training.data.sources.tree import IMAGE_SUFFIXES, PathGuard

PARQUET_ROWS = 10_000  # read at a time


def read_diffusiondb(folder: AnnotatedFolder) -> Iterator[Item]:
    """Yield the images of each part; prompts come from its JSON, else from metadata.parquet."""
    unlisted: dict[str, Path] = {}
    listed_folders = set()
    guard = PathGuard(folder.images, folder.follow_links)
    for path in folder.files:
        if path.suffix != ".json":
            continue
        # beside the JSON, unless the images are elsewhere
        part = path.parent if folder.images == folder.root else folder.images / path.stem
        prompts = folder.json(path)
        if not isinstance(prompts, dict):
            raise DataError(f"{path}: no prompts by the name of an image; give DiffusionDB's files")
        for name, entry in prompts.items():
            image = guard.inside(part, name)
            if image is None or not isinstance(entry, dict):
                folder.problems["broken annotation"] += 1
                continue
            columns = {"seed": entry.get("se"), "step": entry.get("st"), "cfg": entry.get("c")}
            yield Item(name, [entry.get("p")], "train", columns, image)
        if not part.is_dir():
            continue
        listed_folders.add(part)
        unlisted |= {image.name: image for image in part.iterdir()
                     if image.suffix.lower() in IMAGE_SUFFIXES and image.name not in prompts}

    for image in folder.image_files():
        if image.parent not in listed_folders:
            unlisted[image.name] = image
    for path in folder.files:
        if path.suffix == ".parquet":
            yield from _from_metadata(path, unlisted)
    folder.problems["image without a caption"] += len(unlisted)


def _from_metadata(path: Path, unlisted: dict[str, Path]) -> Iterator[Item]:
    """Yield the images that DiffusionDB's table has a prompt for, and take them off `unlisted`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [name for name in ("image_name", "prompt", "seed", "step", "cfg")
                 if name in file.schema_arrow.names]
        if names[:2] != ["image_name", "prompt"]:
            raise DataError(f"{path}: no columns image_name and prompt; give DiffusionDB's own")
        for batch in file.iter_batches(PARQUET_ROWS, columns=names):
            for row, name in enumerate(batch["image_name"].to_pylist()):
                image = unlisted.pop(name, None)
                if image is not None:
                    (record,) = batch.slice(row, 1).to_pylist()
                    columns = {known: record[known] for known in names[2:]}
                    yield Item(name, [record["prompt"]], "train", columns, image)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)[:200]})") from None
