"""Parquet files read in place, by row group, without a copy in a cache."""

from __future__ import annotations

import copy
import errno
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from tokenloom_common.errors import RunFailedError, one_line
from training.data.sources.collector import find_name
from training.data.sources.drops import BadItemError
from training.data.sources.left_out import OTHER_SPLITS, SPLIT_COLUMNS, rows_of_train

MAX_OPEN = 32  # files; a process may often have 1,024, and workers multiply them
MACHINE_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}
"""Errors of the machine, not of a file: no item is counted as unusable for them."""


class RowGroups:
    """Rows of parquet files with the interface of `datasets.Dataset` in its arrow format.

    `rows[i]` and `rows[a:b]` are Arrow tables. Decoded row groups are kept until they hold
    `keep_rows` rows, the least recently used one going first. `chunk_bounds`: first row of each
    group, then the number of rows. Can be pickled, without the decoded row groups.
    """

    def __init__(self, files: Sequence[Path], keep_rows: int, only_train: bool = False) -> None:
        """Every file must have a readable footer (`table.readable_parquet`).

        only_train: leave out the rows of other splits, where a column names splits.
        """
        import pyarrow.parquet as pq

        self.files = list(files)
        self.keep_rows = keep_rows
        self.left_out: Counter[str] = Counter()
        self._groups: list[tuple[int, int]] = []  # file, row group in it
        self._chosen: dict[tuple[int, int], numpy.ndarray] = {}  # rows to use of a group
        self.chunk_bounds = [0]
        for number, path in enumerate(self.files):
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                self._groups.append((number, group))
                self.chunk_bounds.append(self.chunk_bounds[-1] + rows)
        self.column_names: list[str] = pq.read_schema(self.files[0]).names
        self._reset()
        column = find_name(self.column_names, None, SPLIT_COLUMNS)
        if only_train and column is not None:
            self._choose_train(column)
            self._reset()

    def _choose_train(self, name: str) -> None:
        """Read the column of splits alone, and choose the rows of train."""
        import pyarrow.parquet as pq

        columns: list[list[object]] = []
        for file, group in self._groups:
            try:
                columns.append(self._read_group(file, group, [name])[name].to_pylist())
            except KeyError:  # a file without such a column, as if it held nulls
                rows = pq.read_metadata(self.files[file]).row_group(group).num_rows
                columns.append([None] * rows)
            except BadItemError:
                columns.append([])  # its rows are counted as unusable when they are visited
        chosen = rows_of_train([value for column in columns for value in column])
        if chosen is None or all(chosen):
            return

        self.left_out[OTHER_SPLITS] = len(chosen) - sum(chosen)
        sizes = numpy.diff(self.chunk_bounds).tolist()
        groups = self._groups
        self._groups = []
        self.chunk_bounds = [0]
        start = 0
        for place, column, size in zip(groups, columns, sizes, strict=True):
            if column:
                self._chosen[place] = numpy.flatnonzero(chosen[start:start + len(column)])
                size = len(self._chosen[place])
                start += len(column)
            if size:  # an empty group is no chunk to shuffle
                self._groups.append(place)
                self.chunk_bounds.append(self.chunk_bounds[-1] + size)

    def _reset(self) -> None:
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._bounds = numpy.array(self.chunk_bounds)
        self._largest = int(numpy.diff(self._bounds).max(initial=0))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        for name in ("_open", "_kept", "_bounds", "_largest"):  # made anew by `_reset`
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return self.chunk_bounds[-1]

    def with_format(self, kind: str) -> RowGroups:
        """Return the rows in a format; there is one."""
        if kind != "arrow":
            raise ValueError(f"rows of row groups come as arrow, not {kind}")
        return self

    def select_columns(self, names: Sequence[str]) -> RowGroups:
        """Return the same rows with some of their columns; only these are read."""
        other = copy.copy(self)
        other.column_names = list(names)
        other._reset()  # a shallow copy shares the row groups kept with all columns
        return other

    def __getitem__(self, index: int | slice) -> Any:
        import pyarrow as pa

        if isinstance(index, int):
            row = index
            end = index + 1
        else:
            row, end, _ = index.indices(len(self))

        parts = []
        while row < end:
            # "right": of groups that begin at the same row, the last, which is the one not empty
            group = int(numpy.searchsorted(self._bounds, row, side="right")) - 1
            first = self.chunk_bounds[group]
            group_end = min(end, self.chunk_bounds[group + 1])
            parts.append(self._group(group).slice(row - first, group_end - row))
            row = group_end
        return parts[0] if len(parts) == 1 else pa.concat_tables(parts)

    def _file(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._open:
            while len(self._open) >= MAX_OPEN:
                _, oldest = self._open.popitem(last=False)
                oldest.close()
            # mapped: all processes of a machine read through the same page cache
            self._open[number] = pq.ParquetFile(self.files[number], memory_map=True)
        self._open.move_to_end(number)
        return self._open[number]

    def _group(self, number: int) -> Any:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        file, group = self._groups[number]
        table = self._read_group(file, group, self.column_names)
        if (file, group) in self._chosen:
            table = table.take(self._chosen[file, group])
        self._kept[number] = table

        # a bucket of the DataOrder may pass its shuffle_rows by part of its last row group
        limit = self.keep_rows + self._largest
        while sum(len(kept) for kept in self._kept.values()) > limit:
            self._kept.popitem(last=False)
        return table

    def _read_group(self, file: int, group: int, columns: list[str]) -> Any:
        import pyarrow as pa

        path = self.files[file]
        try:
            parquet = self._file(file)
            return parquet.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) in MACHINE_ERRORS:
                raise RunFailedError(f"{path}: cannot be read ({one_line(error)})") from None
            raise BadItemError(f"{path.name} row group {group}", "broken parquet file",
                               one_line(error)) from None
