"""Tables that `datasets` reads: parquet files and the hub through its cache, save_to_disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.errors import (
    DataError,
    MissingFileError,
    UserError,
    nearest_name,
    one_line,
)
from training.data.sources.collector import (
    CAPTION_COLUMNS,
    CLASS_COLUMNS,
    DOWNLOAD_FIRST,
    IMAGE_COLUMNS,
    find_name,
    lists_urls,
    shown_names,
)
from training.data.sources.drops import BadItem
from training.data.sources.options import EXPECTED, ReadOptions
from training.data.sources.tables.hf_datasets import (
    cache_failure,
    check_cache,
    quiet_datasets,
    unreadable,
)
from training.data.sources.tables.parquet_copy import copied_parquet
from training.data.sources.tree import SAVED_STATE, PathGuard

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow files


class Columns(NamedTuple):
    """The columns to use."""

    image: str
    caption: str
    class_names: list[str] | None = None  # of a caption column that holds numbers of classes


class LoadedTable(NamedTuple):
    """A loaded table, and the files that could not be read."""

    dataset: Any
    columns: Columns
    split: str
    bad: list[BadItem]


class ParquetFiles(NamedTuple):
    """Parquet files that can be read, and those that cannot."""

    good: list[Path]
    rows: int
    columns: Columns
    bad: list[BadItem]


def pick_columns(options: ReadOptions, columns: list[str], where: str) -> Columns:
    """Return the columns of images and of captions, which may be classes if there are no others.

    UserError listing the columns if they are not there, or if several are classes.
    """
    image = _pick_column(options.image_column, IMAGE_COLUMNS, columns, "image", where)
    caption = find_name(columns, options.caption_column, CAPTION_COLUMNS)
    classes = [name for name in columns if name.lower() in CLASS_COLUMNS]
    if caption is None and options.caption_column is None and len(classes) > 1:
        raise UserError(f"{where}: no caption column, and several of classes "
                        f"({', '.join(classes)}); choose one with --data.caption_column")
    usual = (*CAPTION_COLUMNS, *CLASS_COLUMNS)
    return Columns(image, _pick_column(options.caption_column, usual, columns, "caption", where))


def _pick_column(name: str | None, usual: tuple[str, ...], columns: list[str], what: str,
                 where: str) -> str:
    found = find_name(columns, name, usual)
    if found is not None and columns.count(found) > 1:
        raise UserError(f"{where}: {columns.count(found)} columns are called {found}; give each a "
                        "name of its own")
    if found is not None:
        return found
    listed = shown_names(columns)
    if name is not None:
        raise UserError(f"{where}: no column '{name}'{nearest_name(name, columns)} "
                        f"(columns: {listed})")
    if what == "image" and lists_urls(columns):
        raise UserError(f"{where}: {DOWNLOAD_FIRST} (columns: {listed})")
    raise UserError(f"{where}: no {what} column ({' or '.join(usual)}); columns: {listed}; name it "
                    f"with --data.{what}_column")


def readable_parquet(files: list[Path], root: Path, options: ReadOptions) -> ParquetFiles:
    """Keep the files with a readable footer and rows, count the others. DataError if none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good: list[Path] = []
    bad: list[BadItem] = []
    columns: list[str] = []
    total = 0
    for path in files:
        reason = None
        try:
            # of the first file that can be read; the others are compared below
            columns = columns or pq.read_schema(path).names
            rows = pq.read_metadata(path).num_rows
            total += rows
            if not rows:
                reason = "parquet file without rows"
        except (pa.ArrowException, OSError):
            reason = "broken parquet file"
        if reason is None:
            good.append(path)
        else:
            bad.append(BadItem(path.relative_to(root).as_posix(), reason))
    if not good:
        raise DataError(f"{root}: none of its {len(files):,} parquet files can be read "
                        f"(first: {bad[0].key}, {bad[0].reason}); copy or download them again")

    # now, since a stream would meet another type only when it visits the file
    used = _check_same_columns(good, pick_columns(options, columns, str(root)))
    return ParquetFiles(good, total, used, bad)


def _check_same_columns(files: list[Path], columns: Columns) -> Columns:
    """Return the columns with the names of the classes. DataError if files differ."""
    import pyarrow.parquet as pq

    first = pq.read_schema(files[0])
    names = _schema_class_names(first, columns.caption)
    for path in files[1:]:
        schema = pq.read_schema(path)
        for column in (columns.image, columns.caption):
            wanted = first.field(column).type
            found = schema.field(column).type if column in schema.names else None
            if found != wanted:
                what = "is missing" if found is None else f"is {found}"
                raise DataError(f"{path}: column '{column}' {what}, and {wanted} in "
                                f"{files[0].name}; files of a split must have the same columns")
        if _schema_class_names(schema, columns.caption) != names:
            raise DataError(f"{path}: the classes of column '{columns.caption}' have other names "
                            f"than in {files[0].name}; files of a split must have the same")
    return columns._replace(class_names=names)


def _schema_class_names(schema: Any, column: str) -> list[str] | None:
    from datasets import Features

    if b"huggingface" not in (schema.metadata or {}):  # as files have that `datasets` wrote
        return None
    return _class_names(Features.from_arrow_schema(schema), column)


def _class_names(features: Any, column: str) -> list[str] | None:
    from datasets import ClassLabel

    feature = features[column]
    feature = getattr(feature, "feature", feature)  # of a list: several classes per image
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def read_parquet(files: list[Path], root: Path, split: str, options: ReadOptions) -> LoadedTable:
    """Load parquet files as one table; unreadable files and errors as in `readable_parquet`."""
    found = readable_parquet(files, root, options)
    dataset = copied_parquet(found.good, found.rows, root)
    dataset = _without_decoding(dataset, found.columns.image)
    return LoadedTable(dataset, found.columns, split, found.bad)


def read_saved(folder: Path, split: str, options: ReadOptions) -> LoadedTable:
    """Map the Arrow files of a folder of save_to_disk. DataError if it is damaged.

    Nothing but the list of files in state.json is used of what else lies in the folder.
    """
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    tables = []
    guard = PathGuard(folder, options.follow_links)
    try:
        state = json.loads((folder / SAVED_STATE).read_bytes())
        for entry in state["_data_files"]:
            path = guard.inside(folder, entry["filename"])
            if path is None:
                raise ValueError(f"{entry['filename']} lies outside the folder")
            # a file that ends between two batches of rows would be read without an error
            with path.open("rb") as file:
                file.seek(-len(END_OF_STREAM), os.SEEK_END)
                if file.read() != END_OF_STREAM:
                    raise ValueError(f"{path.name} is cut off")
            tables.append(Dataset.from_file(str(path)))
        dataset = concatenate_datasets(tables)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError,
            AttributeError) as error:
        raise DataError(f"{folder}: a damaged folder of save_to_disk ({one_line(error)[:200]}); "
                        "save or copy it again") from None
    return _loaded(dataset, split, str(folder), options)


def _loaded(dataset: Any, split: str, where: str, options: ReadOptions) -> LoadedTable:
    columns = pick_columns(options, dataset.column_names, where)
    columns = columns._replace(class_names=_class_names(dataset.features, columns.caption))
    return LoadedTable(_without_decoding(dataset, columns.image), columns, split, [])


def hub_split(name: str, split: str | None) -> str:
    """Return the name of a split of the hub; None is train, or the first. UserError if missing."""
    known = hub_splits(name)  # a small request first: a wrong split costs no download
    chosen = split or ("train" if "train" in known else known[0])
    if chosen not in known:
        raise UserError(f"{name}: no split '{chosen}'{nearest_name(chosen, known)} "
                        f"(splits: {', '.join(known)})")
    return chosen


def read_hub(name: str, split: str, options: ReadOptions) -> LoadedTable:
    """Load a data set of the hub by its id. MissingFileError if it cannot be reached."""
    return _loaded(_fetch(name, split), split, name, options)


def hub_splits(name: str) -> list[str]:
    """Return the splits of a hub data set. MissingFileError if it cannot be reached."""
    from datasets import get_dataset_split_names

    check_cache(0)
    try:
        with quiet_datasets():
            return get_dataset_split_names(name)
    except Exception as error:
        # all exceptions: the hub's client lets those of its HTTP library through
        missing = MissingFileError(f"{name}: neither a local path nor a hub data set that can be "
                                   f"fetched ({one_line(error)[:200]}); expected {EXPECTED}")
        raise cache_failure(error) or missing from None


def hub_split_sizes(name: str) -> dict[str, int | None]:
    """Return the rows of each split of a hub data set; None where its card does not say."""
    from datasets import load_dataset_builder

    sizes: dict[str, int | None] = dict.fromkeys(hub_splits(name))
    try:
        with quiet_datasets():
            known = load_dataset_builder(name).info.splits or {}
    except Exception:  # as in hub_splits, which has reached it
        known = {}
    return {split: getattr(known.get(split), "num_examples", None) for split in sizes}


def _fetch(name: str, split: str) -> Any:
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with quiet_datasets():
            return load_dataset(name, split=split)
    except (DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        failure = unreadable(error, f"{name}: cannot be fetched from the hub")
        raise cache_failure(error) or failure from None


def _without_decoding(dataset: Any, image_column: str) -> Any:
    """Keep images as bytes: `open_image` decodes them, after its checks."""
    from datasets import Image

    if isinstance(dataset.features[image_column], Image):
        return dataset.cast_column(image_column, Image(decode=False))
    return dataset
