"""Captioned pictures behind one door, `open_dataset`: folders, parquet, webdataset shards or a hub id, all through
Hugging Face `datasets`, each picture decoded by our own guarded reader when it is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, UserError
from tokenloom_common.extras import require_extra
from training.data.sources.captioned_images import SCAN_ROWS, CaptionedImages, caption_values
from training.data.sources.captions import clean_captions
from training.data.sources.drops import BadItem, in_words
from training.data.sources.folder import Collector, as_dataset, read_metadata, read_sidecars
from training.data.sources.in_place import RowGroups, indexed_tars
from training.data.sources.locate import Layout, find_layout
from training.data.sources.table import hub_splits, read_hub, read_parquet, whole_files
from training.data.sources.tar import read_tars


@dataclass(frozen=True)
class _Options:
    layout: Layout
    split: str | None
    caption_column: str | None
    image_column: str | None
    streamed_rows: int


def open_dataset(path: str | Path, *, split: str | None = None, caption_column: str | None = None,
                 image_column: str | None = None, streamed_rows: int = 0) -> CaptionedImages:
    """Open captioned pictures at a local path or hub id.

    `split` None is train (or the only split). `caption_column` None is the first of text, captions, caption, prompt.
    `streamed_rows`: parquet and tar shards are read where they lie, and so many rows are kept; 0 = through a cache.
    MissingFileError for a missing path, UserError for an unknown split or column, DataError if nothing is usable.
    """
    data = load_source(path, split=split, caption_column=caption_column, image_column=image_column,
                       streamed_rows=streamed_rows)
    if not len(data):
        reasons = in_words(data.dropped) or "it is empty"
        first = f"; first: {data.bad_items[0].key}" if data.bad_items else ""
        raise DataError(f"{path}: holds no usable item ({reasons}{first})")
    return data


def list_splits(path: str | Path) -> list[str]:
    """The names of the splits at a path or hub id; a source without splits has 'train'."""
    layout = find_layout(path)
    return hub_splits(str(path)) if layout.kind == "hub" else list(layout.splits)


def load_source(path: str | Path, *, split: str | None = None, caption_column: str | None = None,
                image_column: str | None = None, streamed_rows: int = 0) -> CaptionedImages:
    """`open_dataset` that returns an empty sequence, with its reasons, where nothing is usable."""
    layout = find_layout(path)
    require_extra("datasets", "reading a dataset")
    options = _Options(layout, split, caption_column, image_column, streamed_rows)
    if not streamed_rows:
        return _KINDS[layout.kind](str(path), options)
    if layout.kind not in _IN_PLACE:
        raise UserError(f"{path}: streaming reads parquet and tar shards where they lie; this is another kind of data "
                        f"({layout.kind}), so leave data.streaming out")
    return _IN_PLACE[layout.kind](str(path), options)


def _from_metadata(path: str, options: _Options) -> CaptionedImages:
    (folder,) = options.layout.choose(options.split)
    return _in_memory(path, read_metadata(folder, options.caption_column))


def _from_sidecars(path: str, options: _Options) -> CaptionedImages:
    (folder,) = options.layout.choose(options.split)
    return _in_memory(path, read_sidecars(folder, options.caption_column))


def _from_tars(path: str, options: _Options) -> CaptionedImages:
    shards = options.layout.choose(options.split)
    return _in_memory(path, read_tars(shards, options.layout.root, options.caption_column, options.image_column),
                      in_tar=True)


def _from_indexed_tars(path: str, options: _Options) -> CaptionedImages:
    shards = options.layout.choose(options.split)
    found = indexed_tars(shards, options.layout.root, options.caption_column, options.image_column)
    return CaptionedImages(found.dataset, path=path, image_column=None, caption_column="captions", bad_items=found.bad,
                           caption_repairs=found.repairs, root=None, packed_columns=found.columns, runs=found.runs)


def _in_memory(path: str, found: Collector, in_tar: bool = False) -> CaptionedImages:
    """References and captions as a Dataset held in memory: nothing is cached, so nothing can be stale."""
    return CaptionedImages(as_dataset(found, in_tar), path=path, image_column=None if in_tar else "image",
                           caption_column="captions", bad_items=found.bad, caption_repairs=found.repairs, root=None,
                           packed_columns=sorted(found.columns))


def _from_parquet(path: str, options: _Options) -> CaptionedImages:
    files = options.layout.choose(options.split)
    table = read_parquet(files, options.layout.root, options.caption_column, options.image_column)
    return _scanned(path, table, options.layout.root)


def _from_row_groups(path: str, options: _Options) -> CaptionedImages:
    root = options.layout.root
    files, image, caption, bad = whole_files(options.layout.choose(options.split), root, options.caption_column,
                                             options.image_column)
    rows = RowGroups(files, options.streamed_rows)
    return CaptionedImages(rows, path=path, image_column=image, caption_column=caption, bad_items=bad,
                           caption_repairs=Counter(), root=root, runs=rows.runs)


def _from_hub(path: str, options: _Options) -> CaptionedImages:
    from datasets.config import HF_CACHE_HOME

    return _scanned(path, read_hub(path, options.split, options.caption_column, options.image_column),
                    Path(HF_CACHE_HOME))


def _scanned(path: str, table: Any, root: Path) -> CaptionedImages:
    """Leave out the rows without a usable caption or without any picture, counted; only these columns are read."""
    import pyarrow.compute as pc

    repairs: Counter = Counter()
    bad, good = list(table.bad), []
    rows = table.dataset.select_columns([table.image_column, table.caption_column]).with_format("arrow")
    for start in range(0, len(rows), SCAN_ROWS):
        batch = rows[start:start + SCAN_ROWS]
        no_picture = pc.is_null(batch[table.image_column]).to_pylist()
        for offset, captions in enumerate(caption_values(batch[table.caption_column])):
            if no_picture[offset] or not clean_captions(captions, repairs):
                reason = "no picture" if no_picture[offset] else "no caption"
                bad.append(BadItem(f"row {start + offset}", reason))
            else:
                good.append(start + offset)
    dataset = table.dataset if len(good) == len(table.dataset) else table.dataset.select(good)
    return CaptionedImages(dataset, path=path, image_column=table.image_column, caption_column=table.caption_column,
                           bad_items=bad, caption_repairs=repairs, root=root)


_KINDS: dict[str, Callable[[str, _Options], CaptionedImages]] = {
    "metadata": _from_metadata, "sidecar": _from_sidecars, "parquet": _from_parquet, "tar": _from_tars,
    "hub": _from_hub}
_IN_PLACE: dict[str, Callable[[str, _Options], CaptionedImages]] = {"parquet": _from_row_groups, "tar": _from_indexed_tars}
