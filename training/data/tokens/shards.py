"""Token shards: pictures as code sequences with their captions, in Arrow files that are mapped into memory.

    OUT/tokens.json                 what they are: tokenizer fingerprint, codebook size, grid; per split the files with their
                                    rows, sizes and hashes
    OUT/train-00000-of-00002.arrow  columns captions: list<string>, tokens: uint16|uint32 [views * N], key: string, and
                                    layout: uint16 [views * L] where tokens.json describes one

`datasets.Dataset.from_file` reads them too. Opening maps files; a page is read from disk when a row of it is asked for. A
file's hash is compared, and its tokens checked, when its first row is asked for, or at once where all are small.
"""

# Axes: N image tokens, L layout tokens, R rows, V views (encodings) of a picture

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
from pydantic import Field, field_validator

from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name
from tokenloom_common.files import file_hash, sync_path, write_json_atomic
from training.data.tokens.file import AGAIN, TokenFile, open_token_file, require_pyarrow

INDEX_NAME = "tokens.json"
SCHEMA_VERSION = 2
SUFFIX = ".arrow"
CHECKED_AT_ONCE = 64 << 20  # bytes of a split up to which all of it is checked when it is opened: a tenth of a second


class ShardFile(StrictConfig):
    """One file of a split. Those of schema version 1 are parquet, without size and hash."""

    name: str
    rows: int = Field(0, ge=0)
    size: int | None = Field(None, ge=0)
    blake2b: str | None = None


class SplitIndex(StrictConfig):
    """One split's rows and files."""

    rows: int = Field(ge=0)
    files: list[ShardFile]

    @field_validator("files", mode="before")
    @classmethod
    def _names_alone(cls, files: Any) -> Any:
        """Schema version 1 has names."""
        return [{"name": one} if isinstance(one, str) else one for one in files] if isinstance(files, list) else files


Side = Annotated[int, Field(ge=1, le=1 << 12)]


class LayoutIndex(StrictConfig):
    """What the layouts are: classes of the data or colours of the picture, how many, and on what grid."""

    kind: Literal["classes", "colors"]
    classes: int = Field(ge=2, le=1 << 16)
    grid: tuple[Side, Side]


class TokenIndex(StrictConfig):
    """What tokens.json holds."""

    schema_version: int = SCHEMA_VERSION
    tokenizer_fingerprint: str
    codebook_size: int = Field(ge=2, le=1 << 26)
    grid: tuple[Side, Side]
    views: list[str] = Field(default_factory=lambda: ["plain"], min_length=1)
    layout: LayoutIndex | None = None
    splits: dict[str, SplitIndex]
    dropped: dict[str, int] = Field(default_factory=dict)


def token_dtype(codebook_size: int) -> numpy.dtype:
    """uint16 while it holds every code, else uint32."""
    return numpy.dtype(numpy.uint16 if codebook_size <= 1 << 16 else numpy.uint32)


def write_shard(path: Path, captions: Sequence[Sequence[str]], tokens: numpy.ndarray, keys: Sequence[str],
                layouts: numpy.ndarray | None = None) -> ShardFile:
    """One file that appears whole: captions of R rows, tokens [R, V * N] of the dtype of `token_dtype`, keys, layouts
    [R, V * L] uint16 -> what the index says of it."""
    pyarrow = require_pyarrow()

    def lists(rows: numpy.ndarray) -> Any:
        flat = pyarrow.array(rows.reshape(-1), type=pyarrow.from_numpy_dtype(rows.dtype))
        return pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])

    if not len(keys):
        raise ValueError(f"{path}: a token shard needs at least one row")
    columns = {"captions": pyarrow.array(captions, type=pyarrow.list_(pyarrow.string())), "tokens": lists(tokens),
               "key": pyarrow.array(keys, type=pyarrow.string())}
    if layouts is not None:
        columns["layout"] = lists(layouts)
    batch = pyarrow.record_batch(columns)  # one batch, so that each column lies in one piece
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with pyarrow.ipc.new_stream(str(aside), batch.schema) as writer:
            writer.write_batch(batch)
        sync_path(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return ShardFile(name=path.name, rows=len(keys), size=path.stat().st_size, blake2b=file_hash(path))


def write_index(folder: Path, index: TokenIndex) -> None:
    """tokens.json; written last, so that a folder without it is known to be half-written."""
    write_json_atomic(folder / INDEX_NAME, index.plain())


def read_index(folder: str | Path) -> TokenIndex:
    """tokens.json of a folder, checked."""
    path = Path(folder)
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such folder of token shards; make it with training/encode_dataset.py")
    if not (path / INDEX_NAME).is_file():
        raise MissingFileError(f"{path}: {INDEX_NAME} is missing, so these are no (whole) token shards; "
                               "run training/encode_dataset.py again")
    index = TokenIndex.parse(read_mapping(path / INDEX_NAME), str(path / INDEX_NAME))
    if index.schema_version > SCHEMA_VERSION:
        raise UserError(f"{path / INDEX_NAME}: schema_version {index.schema_version} is newer than this release reads")
    return index


class TokenShards:
    """One split: `captions(i)`, `image_tokens(i)` [N], `layout(i)` [L] or None, `key(i)`; `gather` for many rows at once."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """UserError for an unknown split, damaged files or impossible tokens; DataError when there is no row."""
        self.folder, self.split = Path(folder), split
        self.index = read_index(folder)
        if split not in self.index.splits:
            raise UserError(f"{folder}: no split '{split}'{nearest_name(split, self.index.splits)}")
        entry = self.index.splits[split]
        if not entry.files or not entry.rows:
            raise DataError(f"{folder}: split '{split}' holds no rows")
        rows = sum(len(file) for file in self._files)
        if rows != entry.rows:
            raise UserError(f"{folder}: split '{split}' holds {rows:,} rows, {INDEX_NAME} says {entry.rows:,}; {AGAIN}")
        if sum(file.path.stat().st_size for file in self._files) <= CHECKED_AT_ONCE:
            self.check()

    @cached_property
    def _files(self) -> list[TokenFile]:
        layout = self.index.layout
        shapes = {"tokens": (len(self.index.views), self.index.grid, self.index.codebook_size)}
        if layout is not None:
            shapes["layout"] = (len(self.index.views), layout.grid, layout.classes)
        return [open_token_file(self.folder, file.name, file.size, file.blake2b, shapes)
                for file in self.index.splits[self.split].files]

    @cached_property
    def _starts(self) -> numpy.ndarray:
        return numpy.cumsum([0, *(len(file) for file in self._files)])

    def __getstate__(self) -> dict[str, Any]:  # files are mapped anew by a loader worker, and not sent to it
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_starts")}

    def __len__(self) -> int:
        return self.index.splits[self.split].rows

    def check(self) -> None:
        """Compare every file's hash and check its tokens. UserError naming the file."""
        for file in self._files:
            file.check()

    def token_counts(self) -> numpy.ndarray:
        """How often each code occurs, [codebook_size] int64."""
        counts = numpy.zeros(self.index.codebook_size, dtype=numpy.int64)
        for file in self._files:
            counts += numpy.bincount(file.columns["tokens"].reshape(-1), minlength=len(counts))
        return counts

    def _locate(self, row: int) -> tuple[TokenFile, int]:
        number = int(numpy.searchsorted(self._starts, row, side="right")) - 1
        file = self._files[number]
        file.check_once()
        return file, row - int(self._starts[number])

    def captions(self, row: int) -> list[str]:
        """All captions of a row."""
        file, local = self._locate(row)
        return file.captions(local)

    def image_tokens(self, row: int, view: int = 0) -> numpy.ndarray:
        """Tokens [N] of a row in raster order."""
        file, local = self._locate(row)
        return file.columns["tokens"][local, view]

    def layout(self, row: int, view: int = 0) -> numpy.ndarray | None:
        """Layout [L] of a row in raster order; None where the shards have none."""
        file, local = self._locate(row)
        return file.columns["layout"][local, view] if "layout" in file.columns else None

    def key(self, row: int) -> str:
        """The row's key in the data it was made from."""
        file, local = self._locate(row)
        return file.keys[local].as_py()

    def all_captions(self) -> list[str]:
        """Every caption of the split."""
        return [caption for file in self._files for caption in file.all_captions()]

    def gather(self, rows: numpy.ndarray, views: numpy.ndarray, choice: numpy.ndarray | None,
               names: Sequence[str] = ("tokens",)) -> tuple[list[str], dict[str, numpy.ndarray]]:
        """Of rows [B] int64: one caption each, and the named columns [B, N] or [B, L] of `views` [B].

        choice: [B] in [0, 1), which of its captions; None = the first.
        """
        numbers = numpy.searchsorted(self._starts, rows, side="right") - 1
        order = numpy.argsort(numbers, kind="stable")  # file after file
        used, first = numpy.unique(numbers[order], return_index=True)
        captions: list[str] = [""] * len(rows)
        columns: dict[str, numpy.ndarray] = {}
        for number, begin, end in zip(used.tolist(), first.tolist(), [*first[1:].tolist(), len(rows)], strict=True):
            file, here = self._files[number], order[begin:end]
            file.check_once()
            local = rows[here] - self._starts[number]
            found = file.one_caption(local, None if choice is None else choice[here])
            for place, caption in zip(here.tolist(), found, strict=True):
                captions[place] = caption
            for name in names:
                column = file.columns[name]
                if name not in columns:
                    columns[name] = numpy.empty((len(rows), column.shape[2]), column.dtype)
                columns[name][here] = column[local, views[here]]
        return captions, columns


def check_same_tokenizer(index: TokenIndex, folder: str | Path, codebook_size: int, grid: tuple[int, int],
                         fingerprint: str, tokenizer: str) -> None:
    """UserError naming both sides when tokens and image tokenizer do not belong together."""
    for what, ours, theirs in (("codebook size", index.codebook_size, codebook_size), ("grid", index.grid, grid),
                               ("fingerprint", index.tokenizer_fingerprint, fingerprint)):
        if ours != theirs:
            raise UserError(f"{folder}: tokens of another image tokenizer ({what} {ours}; {tokenizer} has {theirs}); "
                            "encode the data again with training/encode_dataset.py")
