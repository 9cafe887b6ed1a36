"""Parquet files and hub data sets, read through `datasets`, which keeps its own cache of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name, one_line
from training.data.sources.drops import BadItem
from training.data.sources.folder import CAPTION_COLUMNS
from training.data.sources.hf_datasets import quiet_datasets
from training.data.sources.locate import EXPECTED

IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")


class Table(NamedTuple):
    """A loaded table with the columns to use, and the files that could not be read."""

    dataset: Any
    image_column: str
    caption_column: str
    bad: list[BadItem]


def pick_column(name: str | None, usual: tuple[str, ...], columns: list[str], what: str, where: str) -> str:
    """The named column, or the first usual one. UserError listing the columns otherwise."""
    if name is not None:
        if name not in columns:
            raise UserError(f"{where}: no column '{name}'{nearest_name(name, columns)} (columns: {', '.join(columns)})")
        return name
    for candidate in usual:
        if candidate in columns:
            return candidate
    raise UserError(f"{where}: no {what} column ({' or '.join(usual)}); columns: {', '.join(columns)}; "
                    f"name it with {what}_column")


class Files(NamedTuple):
    """Parquet files that can be read, the columns to use, and the files that cannot be read."""

    good: list[Path]
    image_column: str
    caption_column: str
    bad: list[BadItem]


def whole_files(files: list[Path], root: Path, caption_column: str | None, image_column: str | None) -> Files:
    """Those with a readable footer and rows; the others are counted. DataError if there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good: list[Path] = []
    bad: list[BadItem] = []
    columns: list[str] = []
    for path in files:
        try:
            columns = columns or pq.read_schema(path).names
            if pq.read_metadata(path).num_rows:
                good.append(path)
            else:
                bad.append(BadItem(path.relative_to(root).as_posix(), "parquet file without rows"))
        except (pa.ArrowException, OSError):
            bad.append(BadItem(path.relative_to(root).as_posix(), "broken parquet file"))
    if not good:
        raise DataError(f"{root}: none of its {len(files):,} parquet files can be read (first: {bad[0].key}); "
                        "copy or download them again")
    image_column = pick_column(image_column, IMAGE_COLUMNS, columns, "image", str(root))
    caption_column = pick_column(caption_column, CAPTION_COLUMNS, columns, "caption", str(root))
    first = pq.read_schema(good[0])
    for path in good[1:]:
        schema = pq.read_schema(path)
        for column in (image_column, caption_column):
            if column not in schema.names or schema.field(column).type != first.field(column).type:
                what = f"is {schema.field(column).type}" if column in schema.names else "is missing"
                raise DataError(f"{path}: column '{column}' {what}, and {first.field(column).type} in {good[0].name}; files "
                                "of a split must have the same columns")
    return Files(good, image_column, caption_column, bad)


def read_parquet(files: list[Path], root: Path, caption_column: str | None, image_column: str | None) -> Table:
    """Parquet files as one table. A file without a readable footer is left out and counted; DataError if all are."""
    good, image_column, caption_column, bad = whole_files(files, root, caption_column, image_column)
    dataset = _load("parquet", f"{root}: its parquet files cannot be read", name=_identity(good),
                    data_files={"train": [str(path) for path in good]}, split="train")
    return Table(_undecoded(dataset, image_column), image_column, caption_column, bad)


def _identity(files: list[Path]) -> str:
    """Names the cache entry after path, size and time of every file.

    `datasets` itself was seen to serve the old rows after a folder was replaced by another of the same names.
    """
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    return f"tokenloom-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def read_hub(name: str, split: str | None, caption_column: str | None, image_column: str | None) -> Table:
    """A data set of the hub by its id. MissingFileError in one line if it cannot be fetched."""
    known = hub_splits(name)
    chosen = split or ("train" if "train" in known else known[0])
    if chosen not in known:
        raise UserError(f"{name}: no split '{chosen}'{nearest_name(chosen, known)} (splits: {', '.join(known)})")
    dataset = _load(name, f"{name}: cannot be fetched from the hub", split=chosen)
    image_column = pick_column(image_column, IMAGE_COLUMNS, dataset.column_names, "image", name)
    caption_column = pick_column(caption_column, CAPTION_COLUMNS, dataset.column_names, "caption", name)
    return Table(_undecoded(dataset, image_column), image_column, caption_column, [])


def hub_splits(name: str) -> list[str]:
    """The splits of a hub data set. MissingFileError if it cannot be reached."""
    from datasets import get_dataset_split_names

    try:
        with quiet_datasets():
            return get_dataset_split_names(name)
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which we do not know
        raise MissingFileError(f"{name}: neither a local path nor a hub data set that can be fetched "
                               f"({one_line(error)[:200]}); expected {EXPECTED}") from None


def _load(path: str, failure: str, **options: Any) -> Any:
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet_datasets():
            return load_dataset(path, **options)
    except (DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{failure}: {one_line(cause)[:300]}") from None


def _undecoded(dataset: Any, image_column: str) -> Any:
    from datasets import Image

    feature = dataset.features[image_column]
    return dataset.cast_column(image_column, Image(decode=False)) if isinstance(feature, Image) else dataset
