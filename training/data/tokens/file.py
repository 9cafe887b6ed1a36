"""One file of token shards: Arrow's stream format, memory-mapped."""

# Axes: R rows, V views, N values per view

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy

from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.extras import require_extra
from tokenloom_common.files import file_hash

AGAIN = "run training/encode_dataset.py again"


class ColumnShape(NamedTuple):
    """Shape of a column of tokens or layouts: [R, views, height * width], in [0, classes)."""

    views: int
    grid: tuple[int, int]
    classes: int


def require_pyarrow() -> Any:
    """Import pyarrow with compute and ipc. UserError naming the extra if it is not installed."""
    # a submodule becomes an attribute of pyarrow only when it is imported
    for module in ("pyarrow.compute", "pyarrow.ipc"):
        require_extra(module, "a token shard")
    return require_extra("pyarrow", "a token shard")


class TokenFile:
    """Rows of one file.

    columns: tokens [R, V, N], and layout [R, V, L] if the shards have layouts.
    keys: Arrow strings [R].
    """

    def __init__(self, path: Path, table: Any, shapes: dict[str, ColumnShape],
                 blake2b: str) -> None:
        self.path = path
        self._shapes = shapes
        self._blake2b = blake2b
        self._checked = False

        pyarrow = require_pyarrow()
        self._check_types(table, pyarrow)
        self.keys = _single_chunk(table.column("key"))

        captions = _single_chunk(table.column("captions"))
        # a row's captions lie between two row bounds, a caption's bytes between two text bounds
        self._row_bounds = captions.offsets.to_numpy()  # [R + 1]
        self._text_bounds, self._utf8 = _text_buffers(captions.values)

        self.columns = {}
        for name in shapes:
            column = _single_chunk(table.column(name))
            self.columns[name] = self._as_array(column, name, pyarrow)

    def __len__(self) -> int:
        return len(self.keys)

    def _check_types(self, table: Any, pyarrow: Any) -> None:
        """UserError naming the first column that is not of the type that encode_dataset writes."""
        # the raw buffers are read: another type would give other numbers, and no error
        numbers = (pyarrow.uint16(), pyarrow.uint32())
        wrong = []

        captions = table.schema.field("captions").type
        if not (pyarrow.types.is_list(captions) and captions.value_type == pyarrow.string()):
            wrong.append("captions")
        if table.schema.field("key").type != pyarrow.string():
            wrong.append("key")
        for name in self._shapes:
            kind = table.schema.field(name).type
            is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_fixed_size_list(kind)
            if not is_list or kind.value_type not in numbers:
                wrong.append(name)
        # the buffer of a missing value may hold anything
        wrong += [name for name in table.column_names if table.column(name).null_count]

        if wrong:
            found = table.schema.field(wrong[0]).type
            missing = table.column(wrong[0]).null_count
            raise UserError(f"{self.path}: column {wrong[0]} is not as encode_dataset writes it "
                            f"({found}, {missing:,} missing); {AGAIN}")

    def _as_array(self, column: Any, name: str, pyarrow: Any) -> numpy.ndarray:
        """A list column as [R, V, N], without a copy."""
        views, (height, width), _ = self._shapes[name]

        # a list column may have rows of any length: without this the reshape would shift rows
        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        lengths = numpy.unique(lengths)
        if lengths.size > 1:
            raise UserError(f"{self.path}: rows of {name} have {lengths.min()} to {lengths.max()} "
                            f"numbers, not one length; {AGAIN}")

        flat = column.flatten().to_numpy(zero_copy_only=True)
        if flat.size != len(column) * views * height * width:
            raise UserError(f"{self.path}: {flat.size:,} numbers of {name} in {len(column):,} rows "
                            f"do not fill {views} grid(s) of {height} x {width}")
        return flat.reshape(len(column), views, height * width)

    def check_once(self) -> None:
        """Run `check` the first time only."""
        if not self._checked:
            self.check()

    def check(self) -> None:
        """Compare the file's hash with the index, and its values with their range.

        UserError naming the file.
        """
        # before the hash, which takes longest; `one_caption` would take the next row's caption
        if (numpy.diff(self._row_bounds) < 1).any():
            raise UserError(f"{self.path}: a row has no caption; {AGAIN}")
        if file_hash(self.path) != self._blake2b:
            raise UserError(f"{self.path}: damaged (its hash is not the one in tokens.json); "
                            f"{AGAIN}")

        # also of a file with the right hash: on a GPU, a lookup out of range stops the process
        for name, array in self.columns.items():
            classes = self._shapes[name].classes
            highest = int(array.max()) if array.size else 0
            if highest >= classes:
                table = "codebook" if name == "tokens" else "classes"
                raise UserError(f"{self.path}: {name} hold {highest}, which is outside the {table} "
                                f"of {classes}")
        self._checked = True

    def captions(self, row: int) -> list[str]:
        """Return all captions of a row."""
        return self._texts(numpy.arange(self._row_bounds[row], self._row_bounds[row + 1]))

    def all_captions(self) -> list[str]:
        """Return every caption of the file."""
        self.check_once()
        return self._texts(numpy.arange(self._row_bounds[0], self._row_bounds[-1]))

    def one_caption(self, rows: numpy.ndarray, choice: numpy.ndarray | None) -> list[str]:
        """Pick one caption for each of the rows [B].

        choice: [B] in [0, 1), the position among a row's captions; None = its first.
        """
        number = self._row_bounds[rows]
        if choice is not None:
            count = self._row_bounds[rows + 1] - number
            number = number + (choice * count).astype(number.dtype)
        return self._texts(number)

    def _texts(self, numbers: numpy.ndarray) -> list[str]:
        begins = self._text_bounds[numbers].tolist()
        ends = self._text_bounds[numbers + 1].tolist()
        return [str(self._utf8[begin:end], "utf-8")
                for begin, end in zip(begins, ends, strict=True)]


def _text_buffers(texts: Any) -> tuple[numpy.ndarray, memoryview]:
    """Arrow's own buffers of a string array: boundaries [count + 1], and the UTF-8 bytes.

    Slicing them is ten times as fast as asking Arrow for scattered strings one by one.
    """
    _, offsets, utf8 = texts.buffers()
    bounds = numpy.frombuffer(offsets, dtype=numpy.int32)
    # a slice of an array shares the buffers of the whole, and begins at its offset
    bounds = bounds[texts.offset: texts.offset + len(texts) + 1]
    # Arrow has no buffer of text where all strings are empty
    return bounds, memoryview(utf8 if utf8 is not None else b"")


def _single_chunk(column: Any) -> Any:
    """A column's only chunk, or its chunks copied together."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def open_token_file(folder: Path, name: str, size: int, blake2b: str,
                    shapes: dict[str, ColumnShape]) -> TokenFile:
    """Map a file into memory and compare its size with the index.

    UserError if it is missing, truncated, or not a token shard.
    """
    pyarrow = require_pyarrow()
    path = folder / name
    # an index from elsewhere may not lead out of its folder
    if path.name != name or not path.is_file():
        raise MissingFileError(f"{path}: a token shard is missing; {AGAIN}")
    found = path.stat().st_size
    if found != size:
        raise UserError(f"{path}: not a whole token shard ({found:,} bytes, tokens.json says "
                        f"{size:,}); {AGAIN}")

    wanted = ["captions", "key", *shapes]
    try:
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        table = stream.read_all().select(wanted)
        return TokenFile(path, table, shapes, blake2b)
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError,
            AttributeError) as error:
        raise UserError(f"{path}: not a whole token shard ({one_line(error)[:200]}); "
                        f"{AGAIN}") from None
