"""Lines of lists of images: .jsonl, .json, .csv, .tsv of any encoding and separator, parquet."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tokenloom_common.errors import DataError, one_line
from tokenloom_common.extras import require_extra
from tokenloom_common.text_files import TextDecodeError, decode_text, text_codec
from training.data.sources.collector import MAX_TEXT_BYTES, Collector

BYTE_ORDER_MARK = "\ufeff"
DELIMITERS = ",;\t|"
FIRST_RECORDS = 20  # of a .jsonl file, whose keys are its columns

_HEAD_BYTES = 1 << 16
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # the marks of bytes that could not be decoded
_REPLACED = "\ufffd"


def list_columns(path: Path, encoding: str | None) -> list[str]:
    """Return the names of a list's columns; none if it cannot be read."""
    if path.suffix.lower() == ".parquet":
        return parquet_columns(path)
    names: dict[str, None] = {}  # in order
    for line in itertools.islice(_lines(path, encoding), FIRST_RECORDS):
        names |= dict.fromkeys(line.record or {})
    return list(names)


def parquet_columns(path: Path) -> list[str]:
    """Return the columns of a parquet file; none if it cannot be read."""
    require_extra("datasets", "reading parquet files")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return []


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():  # a list of millions would not fit into memory
                for record in batch.to_pylist():
                    yield f"{path.name} row {number}", record
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read after row {number:,} ({one_line(error)[:160]}); "
                        "copy or download it again") from None


class _Line(NamedTuple):
    """A line of a list: its record, or the reason that it has none."""

    number: int
    record: dict[str, Any] | None
    reason: str = "broken metadata line"


def read_records(path: Path, found: Collector, encoding: str | None
                 ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where a line stands and its record; a broken line costs that line only."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet_records(path)
        return
    codec = _list_codec(path, encoding)
    found.encodings[codec.upper()] += 1
    for line in _lines(path, encoding):
        where = f"{path.name} line {line.number}"
        if line.record is None:
            found.drop(where, line.reason)
        elif _is_undecoded(line.record, codec):
            found.drop(where, f"line not {codec.upper()}")
            found.hint(f"{path.name} is not {codec.upper()}: save it as UTF-8, or say what it is "
                       "with --data.encoding (Windows' of Western Europe is cp1252)")
        else:
            yield where, line.record


def _lines(path: Path, encoding: str | None) -> Iterator[_Line]:
    codec = _list_codec(path, encoding)
    # UTF-8 marks its undecodable bytes, so that they can be told from a U+FFFD of the text
    errors = "surrogateescape" if codec == "utf-8" else "replace"
    with path.open(encoding=codec, errors=errors, newline="") as file:
        if codec == "utf-8" and file.read(1) != BYTE_ORDER_MARK:
            file.seek(0)
        if path.suffix.lower() == ".json":
            yield from _json_array(file, path)
        elif path.suffix.lower() == ".jsonl":
            yield from _json_lines(file)
        else:  # newline="" above: a quoted caption may hold line ends
            yield from _csv_lines(file)


def _list_codec(path: Path, encoding: str | None) -> str:
    """Return the codec of a list. DataError for UTF-16 without a byte order mark and the like."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    try:
        decode_text(head, encoding)
    except TextDecodeError as error:
        # single lines of other encodings are counted one by one, and the head may cut a letter
        if error.line is None:
            raise DataError(f"{path}: {error}; save it as UTF-8, or say what it is with "
                            "--data.encoding") from None
    return text_codec(head, encoding)


def _is_undecoded(record: dict[str, Any], codec: str) -> bool:
    texts = [value for value in record.values() if isinstance(value, str)]
    if codec == "utf-8":
        return any(_NOT_UTF8.search(text) for text in texts)
    return any(_REPLACED in text for text in texts)


def _json_lines(file: TextIO) -> Iterator[_Line]:
    number = 0
    # bounded reads: a hostile file may be a single line of many gigabytes
    while line := file.readline(MAX_TEXT_BYTES):
        number += 1
        if len(line) == MAX_TEXT_BYTES and not line.endswith("\n"):
            while line and not line.endswith("\n"):  # pass over the rest of it
                line = file.readline(MAX_TEXT_BYTES)
            yield _Line(number, None, "line too long")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            record = None
        yield _Line(number, record if isinstance(record, dict) else None)


def _json_array(file: TextIO, path: Path) -> Iterator[_Line]:
    """Read one array of records, or a line each under this ending as well."""
    start = file.tell()
    is_array = file.read(1 << 10).lstrip().startswith("[")
    file.seek(start)
    if not is_array:
        yield from _json_lines(file)
        return
    try:
        records = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({one_line(error)[:160]})") from None
    for number, record in enumerate(records):
        yield _Line(number, record if isinstance(record, dict) else None)


def _csv_lines(file: TextIO) -> Iterator[_Line]:
    head = file.readline(MAX_TEXT_BYTES)
    if head.startswith("sep="):  # a line of Excel's, before the names
        head = file.readline(MAX_TEXT_BYTES)
    delimiter = max(DELIMITERS, key=head.count)  # of equally frequent ones the first
    names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
    reader = csv.DictReader(file, names, delimiter=delimiter)
    while True:  # not a for loop: an error in one line must not end the iteration
        try:
            row = next(reader, None)
        except csv.Error:
            yield _Line(reader.line_num + 1, None)
            continue
        if row is None:
            return
        # a line of another length gives the name None, or the value None
        record = {name: value.strip() for name, value in row.items()
                  if isinstance(name, str) and isinstance(value, str)}
        yield _Line(reader.line_num + 1, record)
