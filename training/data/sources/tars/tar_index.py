"""Indexes of tar shards: the headers of a shard are read once and kept in the cache of `datasets`.

    tokenloom-tar/ID.arrow  one row per item, as in Collector.to_dataset
    tokenloom-tar/ID.json   number of rows, bad items, caption repairs and so on: written last

An index that cannot be kept, because the cache cannot be written, is held in memory.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.files import sync_path
from training.data.sources.collector import Collector
from training.data.sources.drops import BadItem
from training.data.sources.options import ReadOptions
from training.data.sources.tables.hf_datasets import cache_name, quiet_datasets
from training.data.sources.tars.archives import tar_folder
from training.data.sources.tars.tar import read_tars, refuse_mixed_splits

INDEX_FORMAT = 3  # raise it when the contents of an index change
FACTS = {"bad", "repairs", "columns", "left_out", "folders", "hints"}


class TarItems(NamedTuple):
    """Items of tar shards, read through their indexes."""

    found: Collector  # what the indexes say, without the rows
    dataset: Any  # memory-mapped, one row per item
    chunk_bounds: list[int]  # first row of each shard, then the number of rows


def open_tar_indexes(shards: Sequence[Path], root: Path, options: ReadOptions) -> TarItems:
    """Map the index of every shard; read the headers of those that have none yet."""
    from datasets import concatenate_datasets

    tables: list[Any] = []
    found = Collector()
    bounds = [0]
    with quiet_datasets():
        for shard in shards:
            facts, table = _shard_index(shard, root, options)
            found.bad += [BadItem(*item) for item in facts["bad"]]
            found.repairs.update(facts["repairs"])
            found.columns |= set(facts["columns"])
            found.left_out.update(facts["left_out"])
            found.folders = {**facts["folders"], **found.folders}
            for hint in facts["hints"]:
                found.hint(hint)
            if facts["rows"]:  # an empty shard is no chunk to shuffle
                tables.append(table)
                bounds.append(bounds[-1] + facts["rows"])
        dataset = concatenate_datasets(tables) if tables else found.to_dataset(in_tar=True)
    refuse_mixed_splits(found.folders, root)
    return TarItems(found, dataset, bounds)


def _shard_index(shard: Path, root: Path, options: ReadOptions) -> tuple[dict[str, Any], Any]:
    """Return the facts and rows of a shard, from its index where there is one."""
    # everything that decides the contents: a changed shard gets another index
    name = cache_name(shard, INDEX_FORMAT, str(root), options.caption_column, options.image_column,
                      options.caption_ending, options.encoding)
    path = tar_folder() / f"{name}.arrow"
    index = _open_index(path)
    if index is not None and _has_shards(index[1]):
        return index

    found = read_tars([shard], root, options)
    dataset = found.to_dataset(in_tar=True)
    facts = {"rows": len(dataset), "bad": found.bad, "repairs": dict(found.repairs),
             "columns": sorted(found.columns), "left_out": dict(found.left_out),
             "folders": found.folders, "hints": list(found.hints)}
    try:
        _write_index(path, dataset, facts)
    except OSError:  # full, or of another user: it is only read again at the next start
        return facts, dataset
    return _open_index(path) or (facts, dataset)


def _has_shards(table: Any) -> bool:
    """Whether the tar of the rows is there: an unpacked one may have been removed."""
    return not len(table) or Path(table[0]["shard"]).is_file()


def _open_index(path: Path) -> tuple[dict[str, Any], Any] | None:
    """Return the facts and rows of a shard; None where the index is missing or damaged."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        table = Dataset.from_file(str(path))
        whole = set(facts) >= FACTS and len(table) == facts["rows"]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None
    return (facts, table) if whole else None


def _write_index(path: Path, dataset: Any, facts: dict[str, Any]) -> None:
    import pyarrow as pa

    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: other processes may be writing the same index
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    table = dataset.data.table.combine_chunks()
    with pa.ipc.new_stream(str(aside), table.schema) as writer:
        writer.write_table(table)
    sync_path(aside)
    os.replace(aside, path)

    # the facts come last: with them the index is whole
    aside.write_text(json.dumps(facts), encoding="utf-8")
    sync_path(aside)
    os.replace(aside, path.with_suffix(".json"))
