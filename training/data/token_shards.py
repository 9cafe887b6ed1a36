"""Token shards: pictures as code sequences with their captions, in parquet files that `datasets` reads.

    OUT/tokens.json                 what they are: tokenizer fingerprint, codebook size, grid, rows and files per split
    OUT/train-00000-of-00002.parquet   columns captions: list<string>, tokens: list<uint16|uint32>, key: string,
                                    and layout: list<uint16> where tokens.json describes one
"""

# Axes: N image tokens, L layout tokens, R rows

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
from pydantic import Field

from tokenloom_common.config import StrictConfig, read_mapping
from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name
from tokenloom_common.files import write_json_atomic

INDEX_NAME = "tokens.json"
SCHEMA_VERSION = 1


class SplitIndex(StrictConfig):
    """One split's rows and files."""

    rows: int = Field(ge=0)
    files: list[str]


class LayoutIndex(StrictConfig):
    """What the layouts are: classes of the data or colours of the picture, how many, and on what grid."""

    kind: Literal["classes", "colors"]
    classes: int = Field(ge=2, le=1 << 16)
    grid: tuple[int, int]


class TokenIndex(StrictConfig):
    """What tokens.json holds."""

    schema_version: int = SCHEMA_VERSION
    tokenizer_fingerprint: str
    codebook_size: int = Field(ge=2)
    grid: tuple[int, int]
    layout: LayoutIndex | None = None
    splits: dict[str, SplitIndex]
    dropped: dict[str, int] = Field(default_factory=dict)


def _pyarrow() -> Any:
    """pyarrow, with its parquet part; UserError that names the extra when it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"token shards need pyarrow ({error}): pip install 'tokenloom[train]'") from None
    return pyarrow


def token_dtype(codebook_size: int) -> numpy.dtype:
    """uint16 while it holds every code, else uint32."""
    return numpy.dtype(numpy.uint16 if codebook_size <= 1 << 16 else numpy.uint32)


def write_shard(path: Path, captions: Sequence[Sequence[str]], tokens: numpy.ndarray, keys: Sequence[str],
                layouts: numpy.ndarray | None = None) -> None:
    """One parquet file: captions of R rows, tokens [R, N] of the dtype of `token_dtype`, keys, layouts [R, L] uint16."""
    pyarrow = _pyarrow()

    def lists(rows: numpy.ndarray) -> Any:
        offsets = pyarrow.array(numpy.arange(len(rows) + 1, dtype=numpy.int32) * rows.shape[1])
        flat = pyarrow.array(rows.reshape(-1), type=pyarrow.from_numpy_dtype(rows.dtype))
        return pyarrow.ListArray.from_arrays(offsets, flat)

    columns = {"captions": pyarrow.array(captions, type=pyarrow.list_(pyarrow.string())), "tokens": lists(tokens),
               "key": pyarrow.array(keys, type=pyarrow.string())}
    if layouts is not None:
        columns["layout"] = lists(layouts)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


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
    """One split in memory: `captions(i)`, `image_tokens(i)` [N], `layout(i)` [L] or None, `key(i)`."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """UserError for an unknown split, damaged files or impossible tokens; DataError when there is no row."""
        self.folder = Path(folder)
        self.index = read_index(folder)
        if split not in self.index.splits:
            raise UserError(f"{folder}: no split '{split}'{nearest_name(split, self.index.splits)}")
        entry = self.index.splits[split]
        pyarrow = _pyarrow()
        table = pyarrow.concat_tables([self._read(name) for name in entry.files]) if entry.files else None
        if table is None or table.num_rows == 0:
            raise DataError(f"{folder}: split '{split}' holds no rows")
        if table.num_rows != entry.rows:
            raise UserError(f"{folder}: split '{split}' holds {table.num_rows:,} rows, {INDEX_NAME} says {entry.rows:,}; "
                            "run training/encode_dataset.py again")
        self._captions = table.column("captions")
        self._keys = table.column("key")
        self._tokens = self._as_array(table.column("tokens"), "token", self.index.grid, self.index.codebook_size)
        layout = self.index.layout
        self._layouts = None
        if layout is not None:
            self._layouts = self._as_array(table.column("layout"), "layout token", layout.grid, layout.classes)

    def _read(self, name: str) -> Any:
        pyarrow = _pyarrow()
        path = self.folder / name
        if Path(name).name != name or not path.is_file():
            raise MissingFileError(f"{path}: a token shard is missing; run training/encode_dataset.py again")
        try:
            return pyarrow.parquet.read_table(path, columns=["captions", "tokens", "key",
                                                             *(["layout"] if self.index.layout else [])])
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a whole token shard ({' '.join(str(error).split())[:200]}); "
                            "run training/encode_dataset.py again") from None

    def _as_array(self, column: Any, what: str, grid: tuple[int, int], classes: int) -> numpy.ndarray:
        """[R, N] in the dtype that the column has."""
        rows, height, width = len(column), *grid
        flat = numpy.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        if flat.size != rows * height * width:
            raise UserError(f"{self.folder}: {flat.size:,} {what}s in {rows:,} rows do not fill a grid of {height} x {width}")
        if flat.size and int(flat.max()) >= classes:
            table = "codebook" if what == "token" else "layout"
            raise UserError(f"{self.folder}: {what} {int(flat.max())} is outside the {table} of {classes}")
        return flat.reshape(rows, height * width)

    def __len__(self) -> int:
        return len(self._tokens)

    def captions(self, row: int) -> list[str]:
        """All captions of a row."""
        return self._captions[row].as_py()

    def image_tokens(self, row: int) -> numpy.ndarray:
        """Tokens [N] of a row in raster order."""
        return self._tokens[row]

    def layout(self, row: int) -> numpy.ndarray | None:
        """Layout [L] of a row in raster order; None where the shards have none."""
        return None if self._layouts is None else self._layouts[row]

    def key(self, row: int) -> str:
        """The row's key in the data it was made from."""
        return self._keys[row].as_py()

    def all_captions(self) -> list[str]:
        """Every caption of the split."""
        return [caption for row in self._captions.to_pylist() for caption in row]


def check_same_tokenizer(index: TokenIndex, folder: str | Path, codebook_size: int, grid: tuple[int, int],
                         fingerprint: str, tokenizer: str) -> None:
    """UserError naming both sides when tokens and image tokenizer do not belong together."""
    for what, ours, theirs in (("codebook size", index.codebook_size, codebook_size), ("grid", index.grid, grid),
                               ("fingerprint", index.tokenizer_fingerprint, fingerprint)):
        if ours != theirs:
            raise UserError(f"{folder}: tokens of another image tokenizer ({what} {ours}; {tokenizer} has {theirs}); "
                            "encode the data again with training/encode_dataset.py")
