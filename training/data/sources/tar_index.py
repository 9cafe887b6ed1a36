"""Indexes of tar shards: the headers of a shard are read once and kept in the cache of `datasets`.

    tokenloom-tar/ID.arrow  one row per item, as in Collector.to_dataset
    tokenloom-tar/ID.json   number of rows, bad items, caption repairs, columns: written last
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.errors import RunFailedError
from tokenloom_common.files import sync_path
from training.data.sources.collector import Collector
from training.data.sources.drops import BadItem
from training.data.sources.hf_datasets import quiet_datasets
from training.data.sources.options import ReadOptions
from training.data.sources.tar import read_tars

INDEX_FORMAT = 1  # raise it when the contents of an index change
FACTS = {"bad", "repairs", "columns"}


class TarItems(NamedTuple):
    """Items of tar shards."""

    dataset: Any  # memory-mapped, one row per item
    bad: list[BadItem]
    repairs: Counter
    columns: list[str]
    chunk_bounds: list[int]  # first row of each shard, then the number of rows


def open_tar_indexes(shards: Sequence[Path], root: Path, options: ReadOptions
                     ) -> TarItems:
    """Map the index of every shard; read the headers of those that have none yet."""
    from datasets import concatenate_datasets
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(HF_DATASETS_CACHE) / "tokenloom-tar"
    tables: list[Any] = []
    bad: list[BadItem] = []
    repairs: Counter = Counter()
    columns: set[str] = set()
    bounds = [0]
    with quiet_datasets():
        for shard in shards:
            name = _index_name(shard, root, options)
            path = cache / f"{name}.arrow"
            index = _open_index(path)
            if index is None:
                _write_index(path, read_tars([shard], root, options))
                index = _open_index(path)
            if index is None:
                raise RunFailedError(f"{path}: the index of {shard} was written and cannot be "
                                     "read; look at the disk")

            facts, table = index
            bad += [BadItem(*item) for item in facts["bad"]]
            repairs.update(facts["repairs"])
            columns |= set(facts["columns"])
            if facts["rows"]:  # an empty shard is no chunk to shuffle
                tables.append(table)
                bounds.append(bounds[-1] + facts["rows"])
        dataset = concatenate_datasets(tables) if tables else Collector().to_dataset(in_tar=True)
    return TarItems(dataset, bad, repairs, sorted(columns), bounds)


def _index_name(shard: Path, root: Path, options: ReadOptions) -> str:
    """Hash everything that decides the contents: a changed shard gets another index."""
    stat = shard.stat()
    facts = (INDEX_FORMAT, str(shard.resolve()), str(root), stat.st_size, stat.st_mtime_ns,
             stat.st_ino, options.caption_column, options.image_column,
             options.caption_ending, options.encoding)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


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


def _write_index(path: Path, found: Collector) -> None:
    import pyarrow as pa

    dataset = found.to_dataset(in_tar=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: other processes may be writing the same index
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    table = dataset.data.table.combine_chunks()
    with pa.ipc.new_stream(str(aside), table.schema) as writer:
        writer.write_table(table)
    sync_path(aside)
    os.replace(aside, path)

    # the facts come last: with them the index is whole
    facts = {"rows": len(dataset), "bad": found.bad, "repairs": dict(found.repairs),
             "columns": sorted(found.columns)}
    aside.write_text(json.dumps(facts), encoding="utf-8")
    sync_path(aside)
    os.replace(aside, path.with_suffix(".json"))
