"""One file of token shards, mapped into memory: Arrow's stream format, or parquet of schema version 1 (read whole)."""

# Axes: R rows, V views, N numbers of a view

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import file_hash

AGAIN = "run training/encode_dataset.py again"
Shapes = dict[str, tuple[int, tuple[int, int], int]]
"""Column -> views, grid, and how many different values there are."""


def require_pyarrow() -> Any:
    """pyarrow, with its parquet and ipc parts; UserError that names the extra when it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"token shards need pyarrow ({error}): pip install 'tokenloom[train]'") from None
    return pyarrow


class TokenFile:
    """Rows of one file. `columns`: tokens [R, V, N], and layout [R, V, L] where there is one; `keys`: Arrow strings [R]."""

    def __init__(self, path: Path, table: Any, shapes: Shapes, blake2b: str | None) -> None:
        pyarrow = require_pyarrow()
        self.path, self._shapes, self._blake2b = path, shapes, blake2b
        self._checked = False
        self._check_types(table, pyarrow)
        self.keys = _one(table.column("key"))
        captions = _one(table.column("captions"))
        self._ends = captions.offsets.to_numpy()
        self._bounds, self._letters = _text_buffers(captions.values)
        self.columns = {name: self._as_array(_one(table.column(name)), name, pyarrow) for name in shapes}

    def __len__(self) -> int:
        return len(self.keys)

    def _check_types(self, table: Any, pyarrow: Any) -> None:
        """What the arrays of Arrow are read as below. UserError naming the column."""
        types, numbers = pyarrow.types, (pyarrow.uint16(), pyarrow.uint32())
        captions = table.schema.field("captions").type
        wrong = [] if types.is_list(captions) and captions.value_type == pyarrow.string() else ["captions"]
        wrong += [] if table.schema.field("key").type == pyarrow.string() else ["key"]
        for name in self._shapes:
            kind = table.schema.field(name).type
            is_list = types.is_list(kind) or types.is_fixed_size_list(kind)
            wrong += [] if is_list and kind.value_type in numbers else [name]
        wrong += [name for name in table.column_names if table.column(name).null_count]
        if wrong:
            found, missing = table.schema.field(wrong[0]).type, table.column(wrong[0]).null_count
            raise UserError(f"{self.path}: column {wrong[0]} is not as encode_dataset writes it ({found}, {missing:,} "
                            f"missing); {AGAIN}")

    def _as_array(self, column: Any, name: str, pyarrow: Any) -> numpy.ndarray:
        views, (height, width), _ = self._shapes[name]
        lengths = numpy.unique(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False))
        if lengths.size > 1:
            raise UserError(f"{self.path}: rows of {name} have {lengths.min()} to {lengths.max()} numbers, not one length; "
                            f"{AGAIN}")
        flat = column.flatten().to_numpy(zero_copy_only=True)
        if flat.size != len(column) * views * height * width:
            raise UserError(f"{self.path}: {flat.size:,} numbers of {name} in {len(column):,} rows do not fill {views} "
                            f"grid(s) of {height} x {width}")
        return flat.reshape(len(column), views, height * width)

    def check_once(self) -> None:
        """`check`, the first time."""
        if not self._checked:
            self.check()

    def check(self) -> None:
        """Compare the hash with the index's and the numbers with what they may be. UserError naming the file."""
        if (numpy.diff(self._ends) < 1).any():
            raise UserError(f"{self.path}: a row has no caption; {AGAIN}")
        if self._blake2b is not None and file_hash(self.path) != self._blake2b:
            raise UserError(f"{self.path}: damaged (its hash is not the one that tokens.json has); {AGAIN}")
        for name, array in self.columns.items():
            classes = self._shapes[name][2]
            if array.size and int(array.max()) >= classes:
                table = "codebook" if name == "tokens" else "classes"
                raise UserError(f"{self.path}: {name} hold {int(array.max())}, which is outside the {table} of {classes}")
        self._checked = True

    def captions(self, row: int) -> list[str]:
        """All captions of a row."""
        return self._texts(numpy.arange(self._ends[row], self._ends[row + 1]))

    def all_captions(self) -> list[str]:
        """Every caption of the file."""
        self.check_once()
        return self._texts(numpy.arange(self._ends[0], self._ends[-1]))

    def one_caption(self, rows: numpy.ndarray, choice: numpy.ndarray | None) -> list[str]:
        """A caption of each of the rows [B]: the one at `choice` [B] in [0, 1) of them, or the first."""
        begin = self._ends[rows]
        if choice is not None:
            begin = begin + (choice * (self._ends[rows + 1] - begin)).astype(begin.dtype)
        return self._texts(begin)

    def _texts(self, numbers: numpy.ndarray) -> list[str]:
        letters = self._letters
        return [str(letters[begin:end], "utf-8")
                for begin, end in zip(self._bounds[numbers].tolist(), self._bounds[numbers + 1].tolist(), strict=True)]


def _text_buffers(texts: Any) -> tuple[numpy.ndarray, memoryview]:
    """Arrow's strings as it keeps them: where each begins (and the last ends), and all letters in UTF-8.

    Ten times as fast as asking Arrow for a hundred strings here and there.
    """
    _, offsets, letters = texts.buffers()
    bounds = numpy.frombuffer(offsets, dtype=numpy.int32)[texts.offset: texts.offset + len(texts) + 1]
    return bounds, memoryview(letters if letters is not None else b"")


def _one(column: Any) -> Any:
    """A column's only chunk, or its chunks copied together."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def open_token_file(folder: Path, name: str, size: int | None, blake2b: str | None, shapes: Shapes) -> TokenFile:
    """Map a file; its size is compared with the index's. UserError for one that is missing, cut or no token shard."""
    pyarrow = require_pyarrow()
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise MissingFileError(f"{path}: a token shard is missing; {AGAIN}")
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{path}: not a whole token shard ({path.stat().st_size:,} bytes, tokens.json says {size:,}); {AGAIN}")
    wanted = ["captions", "key", *shapes]
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path, columns=wanted)
        else:
            table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all().select(wanted)
        return TokenFile(path, table, shapes, blake2b)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole token shard ({one_line(error)[:200]}); {AGAIN}") from None
