"""Token shards: images as token sequences with their captions, in memory-mapped Arrow files.

    OUT/tokens.json                 tokenizer fingerprint, codebook size, grid; per split the files
                                    with their rows, sizes and hashes
    OUT/train-00000-of-00002.arrow  columns captions: list<string>, key: string,
                                    tokens: uint16|uint32 [V * N], and layout: uint16 [V * L]
                                    if the index has one

`datasets.Dataset.from_file` reads them too. Opening only maps the files; pages are read from disk
on access. A file's hash and tokens are checked when its first row is read, or at once if the split
is small.
"""

# Axes: N image tokens, L layout tokens, R rows, V views (encodings) of an image

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
from pydantic import Field

from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name
from tokenloom_common.files import file_hash, sync_path, write_json_atomic
from training.data.tokens.file import (
    AGAIN,
    ColumnShape,
    TokenFile,
    open_token_file,
    require_pyarrow,
)

INDEX_NAME = "tokens.json"
SCHEMA_VERSION = 2
SUFFIX = ".arrow"
CHECKED_AT_ONCE = 64 << 20
"""Splits up to so many bytes are checked when opened, which takes a tenth of a second."""


class ShardFile(StrictConfig):
    """One file of a split; size in bytes."""

    name: str
    rows: int = Field(ge=0)
    size: int = Field(ge=0)
    blake2b: str


class SplitIndex(StrictConfig):
    """Rows and files of one split."""

    rows: int = Field(ge=0)
    files: list[ShardFile]


# bounds on what an index from elsewhere can make us allocate
Side = Annotated[int, Field(ge=1, le=1 << 12)]


class LayoutIndex(StrictConfig):
    """Layouts of the shards: their source, the number of classes and the grid."""

    kind: Literal["classes", "colors"]  # from a column of the data, or from the image itself
    classes: int = Field(ge=2, le=1 << 16)
    grid: tuple[Side, Side]


class TokenIndex(StrictConfig):
    """Contents of tokens.json."""

    schema_version: int = SCHEMA_VERSION
    tokenizer_fingerprint: str
    codebook_size: int = Field(ge=2, le=1 << 26)
    grid: tuple[Side, Side]
    views: list[str] = Field(default_factory=lambda: ["plain"], min_length=1)
    layout: LayoutIndex | None = None
    splits: dict[str, SplitIndex]
    dropped: dict[str, int] = Field(default_factory=dict)


def token_dtype(codebook_size: int) -> numpy.dtype:
    """Return uint16 if it holds every code, else uint32."""
    return numpy.dtype(numpy.uint16 if codebook_size <= 1 << 16 else numpy.uint32)


def write_shard(path: Path, captions: Sequence[Sequence[str]], tokens: numpy.ndarray,
                keys: Sequence[str], layouts: numpy.ndarray | None = None) -> ShardFile:
    """Write one file atomically and return its entry of the index.

    captions: of R rows; tokens [R, V * N] of the dtype of `token_dtype`; layouts [R, V * L] uint16.
    """
    pyarrow = require_pyarrow()
    if not len(keys):
        raise ValueError(f"{path}: a token shard needs at least one row")

    def fixed_size_lists(rows: numpy.ndarray) -> Any:
        flat = pyarrow.array(rows.reshape(-1), type=pyarrow.from_numpy_dtype(rows.dtype))
        return pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])

    columns = {
        "captions": pyarrow.array(captions, type=pyarrow.list_(pyarrow.string())),
        "tokens": fixed_size_lists(tokens),
        "key": pyarrow.array(keys, type=pyarrow.string()),
    }
    if layouts is not None:
        columns["layout"] = fixed_size_lists(layouts)
    batch = pyarrow.record_batch(columns)  # a single batch: each column is contiguous when mapped

    aside = path.with_name(f".{path.name}.tmp")  # a shard has one writer, so no name of its own
    try:
        with pyarrow.ipc.new_stream(str(aside), batch.schema) as writer:
            writer.write_batch(batch)
        sync_path(aside)  # before the rename: a crash must not leave an empty file of that name
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return ShardFile(name=path.name, rows=len(keys), size=path.stat().st_size,
                     blake2b=file_hash(path))


def write_index(folder: Path, index: TokenIndex) -> None:
    """Write tokens.json. Call it last: a folder without it counts as half-written."""
    write_json_atomic(folder / INDEX_NAME, index.plain())


def read_index(folder: str | Path) -> TokenIndex:
    """Read and check tokens.json of a folder. UserError if it is missing or invalid."""
    path = Path(folder)
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such folder of token shards; make it with "
                               "training/encode_dataset.py")
    if not (path / INDEX_NAME).is_file():
        raise MissingFileError(f"{path}: {INDEX_NAME} is missing, so this is not a (whole) folder "
                               f"of token shards; {AGAIN}")
    index = TokenIndex.parse(read_mapping(path / INDEX_NAME), str(path / INDEX_NAME))
    if index.schema_version != SCHEMA_VERSION:
        raise UserError(f"{path / INDEX_NAME}: schema_version is {index.schema_version}, this "
                        f"release reads {SCHEMA_VERSION}; {AGAIN}")
    return index


class TokenShards:
    """One split of token shards: rows by number, or many at once with `gather`."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """Open a split. DataError if it holds no row.

        UserError for an unknown split, damaged files or impossible tokens.
        """
        self.folder = Path(folder)
        self.split = split
        self.index = read_index(folder)
        if split not in self.index.splits:
            raise UserError(f"{folder}: no split '{split}'{nearest_name(split, self.index.splits)}")
        entry = self.index.splits[split]
        if not entry.files or not entry.rows:
            raise DataError(f"{folder}: split '{split}' holds no rows")

        rows = sum(len(file) for file in self._files)
        if rows != entry.rows:
            raise UserError(f"{folder}: split '{split}' holds {rows:,} rows, {INDEX_NAME} says "
                            f"{entry.rows:,}; {AGAIN}")
        # the sizes of the index: opening has compared them with the files
        if sum(file.size for file in entry.files) <= CHECKED_AT_ONCE:
            self.check()

    @cached_property
    def _files(self) -> list[TokenFile]:
        index = self.index
        views = len(index.views)
        shapes = {"tokens": ColumnShape(views, index.grid, index.codebook_size)}
        if index.layout is not None:
            shapes["layout"] = ColumnShape(views, index.layout.grid, index.layout.classes)
        return [open_token_file(self.folder, file.name, file.size, file.blake2b, shapes)
                for file in index.splits[self.split].files]

    @cached_property
    def _starts(self) -> numpy.ndarray:
        """First row of each file, and the number of rows."""
        return numpy.cumsum([0, *(len(file) for file in self._files)])

    def __getstate__(self) -> dict[str, Any]:
        # a loader worker maps the files itself: sending them would copy their contents
        return {name: value for name, value in vars(self).items()
                if name not in ("_files", "_starts")}

    def __len__(self) -> int:
        return self.index.splits[self.split].rows

    def check(self) -> None:
        """Check hash and tokens of every file. UserError naming the file."""
        for file in self._files:
            file.check()

    def token_counts(self) -> numpy.ndarray:
        """Count the occurrences of each code: [codebook_size] int64."""
        counts = numpy.zeros(self.index.codebook_size, dtype=numpy.int64)
        for file in self._files:
            flat = file.columns["tokens"].reshape(-1)
            counts += numpy.bincount(flat, minlength=len(counts))
        return counts

    def _locate(self, row: int) -> tuple[TokenFile, int]:
        """Return the file of a row, checked, and the row's number in it."""
        # "right": a file's first row equals its start
        number = int(numpy.searchsorted(self._starts, row, side="right")) - 1
        file = self._files[number]
        file.check_once()
        return file, row - int(self._starts[number])

    def captions(self, row: int) -> list[str]:
        """Return all captions of a row."""
        file, local = self._locate(row)
        return file.captions(local)

    def image_tokens(self, row: int, view: int = 0) -> numpy.ndarray:
        """Return the tokens [N] of a row in raster order."""
        file, local = self._locate(row)
        return file.columns["tokens"][local, view]

    def layout(self, row: int, view: int = 0) -> numpy.ndarray | None:
        """Return the layout [L] of a row in raster order; None if the shards have no layouts."""
        file, local = self._locate(row)
        if "layout" not in file.columns:
            return None
        return file.columns["layout"][local, view]

    def key(self, row: int) -> str:
        """Return the row's key in the data that was encoded."""
        file, local = self._locate(row)
        return file.keys[local].as_py()

    def all_captions(self) -> list[str]:
        """Return every caption of the split."""
        return [caption for file in self._files for caption in file.all_captions()]

    def gather(self, rows: numpy.ndarray, views: numpy.ndarray, choice: numpy.ndarray | None,
               names: Sequence[str] = ("tokens",)) -> tuple[list[str], dict[str, numpy.ndarray]]:
        """Return one caption per row, and the named columns [B, N] or [B, L], for rows [B] int64.

        views: [B], which encoding of each row. choice: [B] in [0, 1), which of a row's captions;
        None = the first.
        """
        numbers = numpy.searchsorted(self._starts, rows, side="right") - 1  # file of each row
        # groups the rows by file: used[i]'s rows are order[first[i]:last[i]]
        order = numpy.argsort(numbers, kind="stable")
        used, first = numpy.unique(numbers[order], return_index=True)
        last = [*first[1:], len(rows)]

        captions: list[str] = [""] * len(rows)
        columns: dict[str, numpy.ndarray] = {}
        # one visit per file: indexing a memory map row by row is many times slower
        for number, begin, end in zip(used, first, last, strict=True):
            file = self._files[number]
            file.check_once()
            here = order[begin:end]
            local = rows[here] - self._starts[number]

            chosen = None if choice is None else choice[here]
            for place, caption in zip(here, file.one_caption(local, chosen), strict=True):
                captions[place] = caption

            for name in names:
                column = file.columns[name]
                if name not in columns:
                    columns[name] = numpy.empty((len(rows), column.shape[2]), column.dtype)
                columns[name][here] = column[local, views[here]]
        return captions, columns


def check_same_tokenizer(index: TokenIndex, folder: str | Path, codebook_size: int,
                         grid: tuple[int, int], fingerprint: str, tokenizer: str) -> None:
    """UserError naming both sides when tokens and image tokenizer do not belong together."""
    pairs = (("codebook size", index.codebook_size, codebook_size),
             ("grid", index.grid, grid),
             ("fingerprint", index.tokenizer_fingerprint, fingerprint))
    for what, of_tokens, of_tokenizer in pairs:
        if of_tokens != of_tokenizer:
            raise UserError(f"{folder}: tokens of another image tokenizer ({what} {of_tokens}; "
                            f"{tokenizer} has {of_tokenizer}); encode the data again with "
                            "training/encode_dataset.py")
