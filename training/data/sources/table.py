"""Parquet files and data sets of the hub, read through `datasets`, which keeps a cache of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.errors import (
    DataError,
    MissingFileError,
    UserError,
    nearest_name,
    one_line,
)
from training.data.sources.collector import CAPTION_COLUMNS, IMAGE_COLUMNS
from training.data.sources.drops import BadItem
from training.data.sources.hf_datasets import quiet_datasets
from training.data.sources.options import EXPECTED, ReadOptions


class LoadedTable(NamedTuple):
    """A loaded table with the columns to use, and the files that could not be read."""

    dataset: Any
    image_column: str
    caption_column: str
    bad: list[BadItem]


class ParquetFiles(NamedTuple):
    """Parquet files that can be read, the columns to use, and the files that cannot be read."""

    good: list[Path]
    image_column: str
    caption_column: str
    bad: list[BadItem]


def pick_column(name: str | None, usual: tuple[str, ...], columns: list[str], what: str,
                where: str) -> str:
    """Return the named column, or the first usual one. UserError listing the columns otherwise."""
    listed = ", ".join(columns)
    if name is not None:
        if name not in columns:
            raise UserError(f"{where}: no column '{name}'{nearest_name(name, columns)} "
                            f"(columns: {listed})")
        return name
    for candidate in usual:
        if candidate in columns:
            return candidate
    raise UserError(f"{where}: no {what} column ({' or '.join(usual)}); columns: {listed}; name it "
                    f"with {what}_column")


def readable_parquet(files: list[Path], root: Path, options: ReadOptions) -> ParquetFiles:
    """Keep the files with a readable footer and rows, count the others. DataError if none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good: list[Path] = []
    bad: list[BadItem] = []
    columns: list[str] = []
    for path in files:
        reason = None
        try:
            # of the first file that can be read; the others are compared below
            columns = columns or pq.read_schema(path).names
            if not pq.read_metadata(path).num_rows:
                reason = "parquet file without rows"
        except (pa.ArrowException, OSError):
            reason = "broken parquet file"
        if reason is None:
            good.append(path)
        else:
            bad.append(BadItem(path.relative_to(root).as_posix(), reason))
    if not good:
        raise DataError(f"{root}: none of its {len(files):,} parquet files can be read "
                        f"(first: {bad[0].key}); copy or download them again")

    image_column = pick_column(options.image_column, IMAGE_COLUMNS, columns, "image", str(root))
    caption_column = pick_column(options.caption_column, CAPTION_COLUMNS, columns, "caption",
                                 str(root))
    # now, since a stream would meet another type only when it visits the file
    _check_same_columns(good, (image_column, caption_column))
    return ParquetFiles(good, image_column, caption_column, bad)


def _check_same_columns(files: list[Path], columns: tuple[str, ...]) -> None:
    import pyarrow.parquet as pq

    first = pq.read_schema(files[0])
    for path in files[1:]:
        schema = pq.read_schema(path)
        for column in columns:
            wanted = first.field(column).type
            found = schema.field(column).type if column in schema.names else None
            if found != wanted:
                what = "is missing" if found is None else f"is {found}"
                raise DataError(f"{path}: column '{column}' {what}, and {wanted} in "
                                f"{files[0].name}; files of a split must have the same columns")


def read_parquet(files: list[Path], root: Path, options: ReadOptions) -> LoadedTable:
    """Load parquet files as one table; unreadable files and errors as in `readable_parquet`."""
    found = readable_parquet(files, root, options)
    paths = [str(path) for path in found.good]
    dataset = _load("parquet", f"{root}: its parquet files cannot be read",
                    name=_cache_name(found.good), data_files={"train": paths}, split="train")
    dataset = _without_decoding(dataset, found.image_column)
    return LoadedTable(dataset, found.image_column, found.caption_column, found.bad)


def _cache_name(files: list[Path]) -> str:
    """Name the cache entry by path, size, time and inode of every file.

    `datasets` itself was seen to serve the old rows after a folder was replaced by another with the
    same names.
    """
    facts = []
    for path in files:
        stat = path.stat()
        facts.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return f"tokenloom-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def read_hub(name: str, split: str | None, options: ReadOptions) -> LoadedTable:
    """Load a data set of the hub by its id. MissingFileError if it cannot be reached."""
    known = hub_splits(name)  # a small request first: a wrong split costs no download
    chosen = split or ("train" if "train" in known else known[0])
    if chosen not in known:
        raise UserError(f"{name}: no split '{chosen}'{nearest_name(chosen, known)} "
                        f"(splits: {', '.join(known)})")
    dataset = _load(name, f"{name}: cannot be fetched from the hub", split=chosen)

    columns = dataset.column_names
    image_column = pick_column(options.image_column, IMAGE_COLUMNS, columns, "image", name)
    caption_column = pick_column(options.caption_column, CAPTION_COLUMNS, columns, "caption", name)
    return LoadedTable(_without_decoding(dataset, image_column), image_column, caption_column, [])


def hub_splits(name: str) -> list[str]:
    """Return the splits of a hub data set. MissingFileError if it cannot be reached."""
    from datasets import get_dataset_split_names

    try:
        with quiet_datasets():
            return get_dataset_split_names(name)
    except Exception as error:
        # all exceptions: the hub's client lets those of its HTTP library through
        raise MissingFileError(f"{name}: neither a local path nor a hub data set that can be "
                               f"fetched ({one_line(error)[:200]}); expected {EXPECTED}") from None


def _load(path: str, failure: str, **options: Any) -> Any:
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet_datasets():
            return load_dataset(path, **options)
    except (DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        # `datasets` wraps what happened in an error that says only that loading failed
        cause = error.__cause__ or error
        raise DataError(f"{failure}: {one_line(cause)[:300]}") from None


def _without_decoding(dataset: Any, image_column: str) -> Any:
    """Keep images as bytes: `open_image` decodes them, after its checks."""
    from datasets import Image

    if isinstance(dataset.features[image_column], Image):
        return dataset.cast_column(image_column, Image(decode=False))
    return dataset
