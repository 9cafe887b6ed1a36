"""Shards read where they lie: parquet by the row group, tar by an index that is made once. Nothing is copied into a cache."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import uuid
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from tokenloom_common.errors import RunFailedError, one_line
from tokenloom_common.files import sync_path
from training.data.sources.drops import BadItem, BadItemError
from training.data.sources.folder import Collector, as_dataset
from training.data.sources.hf_datasets import quiet_datasets
from training.data.sources.tar import read_tars

MAX_OPEN = 32  # files; a process may often have 1,024, and workers multiply them
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}
"""What says nothing against a file: no picture is counted as unusable for it."""
INDEX_FORMAT = 1  # raise it when a tar's index holds something else


class RowGroups:
    """Rows of parquet files as `datasets.Dataset` gives them in its arrow format: `rows[i]`, `rows[a:b]` are Arrow tables.

    Decoded row groups are kept until they hold `keep_rows` rows, the one used longest ago going first. `runs`: where each
    group's rows begin, ending with the number of all rows. Can be pickled; what is kept is not.
    """

    def __init__(self, files: Sequence[Path], keep_rows: int) -> None:
        """Every file must have a readable footer (`table_source.whole_files`)."""
        import pyarrow.parquet as pq

        self.files, self.keep_rows = list(files), keep_rows
        self._groups: list[tuple[int, int]] = []  # file, row group
        self.runs = [0]
        for number, path in enumerate(self.files):
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self.runs.append(self.runs[-1] + metadata.row_group(group).num_rows)
        self.column_names: list[str] = pq.read_schema(self.files[0]).names
        self._start()

    def _start(self) -> None:
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._starts = numpy.array(self.runs)
        self._largest = int(numpy.diff(self._starts).max())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_kept", "_starts", "_largest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __len__(self) -> int:
        return self.runs[-1]

    def with_format(self, kind: str) -> RowGroups:
        """The rows in a format; there is one."""
        if kind != "arrow":
            raise ValueError(f"rows of row groups come as arrow, not {kind}")
        return self

    def select_columns(self, names: Sequence[str]) -> RowGroups:
        """The same rows with some of their columns, of which alone is read."""
        other = copy.copy(self)
        other.column_names = list(names)
        other._start()
        return other

    def __getitem__(self, index: int | slice) -> Any:
        import pyarrow as pa

        first, last = (index, index + 1) if isinstance(index, int) else index.indices(len(self))[:2]
        parts = []
        while first < last:
            group = int(numpy.searchsorted(self._starts, first, side="right")) - 1
            end = min(last, self.runs[group + 1])
            parts.append(self._group(group).slice(first - self.runs[group], end - first))
            first = end
        return parts[0] if len(parts) == 1 else pa.concat_tables(parts)

    def _file(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[number] = pq.ParquetFile(self.files[number], memory_map=True)
        self._open.move_to_end(number)
        return self._open[number]

    def _group(self, number: int) -> Any:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        import pyarrow as pa

        file, group = self._groups[number]
        try:
            table = self._file(file).read_row_group(group, columns=self.column_names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) in OF_THE_MACHINE:
                raise RunFailedError(f"{self.files[file]}: cannot be read ({one_line(error)})") from None
            raise BadItemError(f"{self.files[file].name} row group {group}", "broken parquet file", one_line(error)) from None
        self._kept[number] = table
        while sum(len(kept) for kept in self._kept.values()) > self.keep_rows + self._largest:  # buckets end so
            self._kept.popitem(last=False)
        return table


class TarRows(NamedTuple):
    """Items of tar shards: a memory-mapped Dataset with a row each, what was found wrong, and where each shard begins."""

    dataset: Any
    bad: list[BadItem]
    repairs: Counter
    columns: list[str]
    runs: list[int]


def indexed_tars(shards: Sequence[Path], root: Path, caption_column: str | None, image_column: str | None) -> TarRows:
    """Read the headers of every shard that has no index yet, and map the indices. They lie in the cache of `datasets`."""
    from datasets import concatenate_datasets
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(HF_DATASETS_CACHE) / "tokenloom-tar"
    found: list[Any] = []
    bad: list[BadItem] = []
    repairs: Counter = Counter()
    columns: set[str] = set()
    runs = [0]
    with quiet_datasets():
        for shard in shards:
            rows = cache / f"{_identity(shard, root, caption_column, image_column)}.arrow"
            opened = _open_index(rows)
            if opened is None:
                _write_index(rows, read_tars([shard], root, caption_column, image_column))
                opened = _open_index(rows)
            if opened is None:
                raise RunFailedError(f"{rows}: the index of {shard} was written and cannot be read; look at the disk")
            facts, table = opened
            bad += [BadItem(*one) for one in facts["bad"]]
            repairs.update(facts["repairs"])
            columns |= set(facts["columns"])
            if facts["rows"]:
                found.append(table)
                runs.append(runs[-1] + facts["rows"])
        dataset = concatenate_datasets(found) if found else as_dataset(Collector(), in_tar=True)
    return TarRows(dataset, bad, repairs, sorted(columns), runs)


def _identity(shard: Path, root: Path, caption_column: str | None, image_column: str | None) -> str:
    """Names a shard's index after all that decides what it holds: another time or size makes another index."""
    stat = shard.stat()
    facts = (INDEX_FORMAT, str(shard.resolve()), str(root), stat.st_size, stat.st_mtime_ns, stat.st_ino, caption_column,
             image_column)
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _open_index(path: Path) -> tuple[dict[str, Any], Any] | None:
    """A shard's facts and rows; None where there is no whole index."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        table = Dataset.from_file(str(path))
        return (facts, table) if set(facts) >= {"bad", "repairs", "columns"} and len(table) == facts["rows"] else None
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        return None


def _write_index(path: Path, collector: Collector) -> None:
    """Rows as an Arrow stream, then the facts beside them, which say that the rows are whole."""
    import pyarrow as pa

    dataset = as_dataset(collector, in_tar=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    table = dataset.data.table.combine_chunks()
    with pa.ipc.new_stream(str(aside), table.schema) as writer:
        writer.write_table(table)
    sync_path(aside)
    os.replace(aside, path)
    aside.write_text(json.dumps({"rows": len(dataset), "bad": collector.bad, "repairs": dict(collector.repairs),
                                 "columns": sorted(collector.columns)}), encoding="utf-8")
    sync_path(aside)
    os.replace(aside, path.with_suffix(".json"))
