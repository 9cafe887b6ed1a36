"""Open captioned images of any format: folders, parquet, webdataset shards or a hub id.

All are rows of a Hugging Face `datasets.Dataset` (or of RowGroups, which looks like one).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, UserError
from tokenloom_common.extras import require_extra
from training.data.sources.captioned_images import SCAN_ROWS, CaptionedImages, ImageTable
from training.data.sources.captions import caption_values, clean_captions, unusable_reason
from training.data.sources.collector import Collector, find_name
from training.data.sources.drops import BadItem, format_reasons
from training.data.sources.folders.folder import read_classes, read_lists, read_sidecars
from training.data.sources.left_out import (
    DOWNLOADS_FAILED,
    OTHER_SPLITS,
    SPLIT_COLUMNS,
    STATUS_COLUMNS,
    download_failed,
    rows_of_train,
)
from training.data.sources.locate import FileLayout, find_files
from training.data.sources.options import ReadOptions
from training.data.sources.tables.row_groups import RowGroups
from training.data.sources.tables.table import (
    LoadedTable,
    hub_split,
    hub_splits,
    read_hub,
    read_parquet,
    read_saved,
    readable_parquet,
)
from training.data.sources.tars.tar import read_tars
from training.data.sources.tars.tar_index import open_tar_indexes


@dataclass(frozen=True)
class Source:
    """A data set to open."""

    path: str
    layout: FileLayout
    split: str
    options: ReadOptions

    @property
    def files(self) -> list[Path]:
        """The files of the split."""
        return self.layout.splits[self.split]


def open_dataset(path: str | Path, *, split: str | None = None, **options: Any) -> CaptionedImages:
    """Open captioned images at a local path or hub id.

    split: None is train (or the only split). options: fields of ReadOptions.

    MissingFileError for a missing path, UserError for an unknown split or column, DataError if
    nothing is usable.
    """
    data = load_source(path, split=split, **options)
    if not len(data):
        reasons = format_reasons(data.dropped + data.left_out) or "it is empty"
        first = f"; first: {data.bad_items[0].key}" if data.bad_items else ""
        hints = "".join(f"; {hint}" for hint in data.hints)
        raise DataError(f"{path}: holds no usable item ({reasons}{first}){hints}")
    return data


def list_splits(path: str | Path, **options: Any) -> list[str]:
    """Return the names of the splits at a path or hub id; a source without splits has 'train'."""
    layout = find_files(path, ReadOptions(**options))
    return hub_splits(str(path)) if layout.format == "hub" else list(layout.splits)


def load_source(path: str | Path, *, split: str | None = None, **options: Any) -> CaptionedImages:
    """Like `open_dataset`, but return an empty sequence, with its reasons, if nothing is usable."""
    chosen = ReadOptions(**options)
    layout = find_files(path, chosen)  # first: a wrong path is reported even without the extra
    require_extra("datasets", "reading a dataset")
    streaming = chosen.streamed_rows > 0
    if streaming and layout.format not in STREAMING_READERS:
        raise UserError(f"{path}: streaming reads parquet and tar shards where they lie; this is "
                        f"another kind of data ({layout.format}), so leave data.streaming out")
    readers = STREAMING_READERS if streaming else READERS
    name = hub_split(str(path), split) if layout.format == "hub" else layout.choose(split)
    table = readers[layout.format](Source(str(path), layout, name, chosen))
    return CaptionedImages(str(path), table, chosen.max_pixels)


def _collected(read: Callable[[FileLayout, str, ReadOptions], Collector], source: Source
               ) -> ImageTable:
    found = read(source.layout, source.split, source.options)
    return _collected_table(found, found.to_dataset(in_tar=False), image_column="image")


def _open_tars(source: Source) -> ImageTable:
    found = read_tars(source.files, source.layout.root, source.options)
    return _collected_table(found, found.to_dataset(in_tar=True))


def _stream_tars(source: Source) -> ImageTable:
    items = open_tar_indexes(source.files, source.layout.root, source.options)
    return _collected_table(items.found, items.dataset, chunk_bounds=items.chunk_bounds)


def _collected_table(found: Collector, dataset: Any, image_column: str | None = None,
                     chunk_bounds: list[int] | None = None) -> ImageTable:
    return ImageTable(dataset, "captions", image_column, bad_items=found.bad,
                      caption_repairs=found.repairs, packed_columns=sorted(found.columns),
                      chunk_bounds=chunk_bounds, encodings=found.encodings,
                      hints=list(found.hints), left_out=found.left_out)


def _open_parquet(source: Source) -> ImageTable:
    root = source.layout.root
    table = read_parquet(source.files, root, source.split, source.options)
    return _usable_rows(table, root)


def _stream_parquet(source: Source) -> ImageTable:
    root = source.layout.root
    files = readable_parquet(source.files, root, source.options)
    # captions are looked at when a row is visited: scanning them here would read all shards
    rows = RowGroups(files.good, source.options.streamed_rows, source.split == "train")
    used = files.columns
    return ImageTable(rows, used.caption, used.image, root=root, bad_items=files.bad,
                      chunk_bounds=rows.chunk_bounds, class_names=used.class_names,
                      left_out=rows.left_out)


def _open_saved(source: Source) -> ImageTable:
    folder, *others = source.files
    if others:
        raise UserError(f"{source.path}: holds several folders of save_to_disk ({folder.name}, "
                        f"{others[0].name}); give the one that is meant")
    return _usable_rows(read_saved(folder, source.split, source.options), folder)


def _open_hub(source: Source) -> ImageTable:
    from datasets.config import HF_CACHE_HOME

    table = read_hub(source.path, source.split, source.options)
    return _usable_rows(table, Path(HF_CACHE_HOME))  # where `datasets` puts downloaded images


def _usable_rows(table: LoadedTable, root: Path) -> ImageTable:
    """Leave out and count the rows without a usable caption or without any image."""
    repairs: Counter = Counter()
    left_out: Counter = Counter()
    bad = list(table.bad)
    good = []
    facts = [name for name in STATUS_COLUMNS if name in table.dataset.column_names]
    used = table.columns
    columns = {used.image, used.caption, *facts}  # no other column is read
    rows = table.dataset.select_columns(list(columns)).with_format("arrow")
    in_split = _rows_in_split(table)
    for start in range(0, len(rows), SCAN_ROWS):
        batch = rows[start:start + SCAN_ROWS]
        no_image = _without_image(batch[used.image])
        statuses = batch.select(facts).to_pylist() if any(no_image) else []
        values = caption_values(batch[used.caption], used.class_names)
        for offset, captions in enumerate(values):
            row = start + offset
            if in_split is not None and not in_split[row]:
                left_out[OTHER_SPLITS] += 1
            elif no_image[offset] and download_failed(statuses[offset]):
                left_out[DOWNLOADS_FAILED] += 1
            elif no_image[offset]:
                bad.append(BadItem(f"row {row}", "no picture"))
            elif not clean_captions(captions, repairs):
                bad.append(BadItem(f"row {row}", unusable_reason(captions)))
            else:
                good.append(row)

    dataset = table.dataset
    if len(good) < len(dataset):  # `select` puts a list of indices before every later read
        dataset = dataset.select(good)
    return ImageTable(dataset, used.caption, used.image, root=root, bad_items=bad,
                      caption_repairs=repairs, class_names=used.class_names, left_out=left_out)


def _rows_in_split(table: LoadedTable) -> list[bool] | None:
    """Whether each row belongs to the split; None if all do."""
    column = find_name(table.dataset.column_names, None, SPLIT_COLUMNS)
    if table.split != "train" or column is None:
        return None
    rows = table.dataset.select_columns([column]).with_format("arrow")
    return rows_of_train(rows[:][column].to_pylist())


def _without_image(column: Any) -> list[bool]:
    """Whether each row of an Arrow column has no image: a null, or a struct of nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = pc.is_null(column)
    if pa.types.is_struct(column.type):
        empty = [pc.is_null(pc.struct_field(column, [number]))
                 for number in range(column.type.num_fields)]
        missing = pc.or_(missing, functools.reduce(pc.and_, empty))
    return missing.to_pylist()


READERS: dict[str, Callable[[Source], ImageTable]] = {
    "metadata": functools.partial(_collected, read_lists),
    "sidecar": functools.partial(_collected, read_sidecars),
    "classes": functools.partial(_collected, read_classes),
    "parquet": _open_parquet,
    "tar": _open_tars,
    "saved": _open_saved,
    "hub": _open_hub,
}
STREAMING_READERS: dict[str, Callable[[Source], ImageTable]] = {
    "parquet": _stream_parquet,
    "tar": _stream_tars,
}
