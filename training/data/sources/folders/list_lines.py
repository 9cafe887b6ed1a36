"""Lines of lists of images: .jsonl, .json, .csv, .tsv of any encoding and separator, parquet."""

from __future__ import annotations

import codecs
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
JSON_ENDINGS = (".json", ".jsonl")
TOO_LONG = "line too long"
BROKEN_QUOTES = "line with broken quotes"
MORE_FIELDS = "line with more fields than columns"
FIRST_RECORDS = 20  # of a .jsonl file, whose keys are its columns

_HEAD_BYTES = 1 << 16
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # the marks of bytes that could not be decoded
_REPLACED = "\ufffd"


def list_columns(path: Path, encoding: str | None) -> list[str]:
    """Return the names of a list's columns; none if it cannot be read."""
    ending = path.suffix.lower()
    if ending == ".parquet":
        return parquet_columns(path)
    if ending not in JSON_ENDINGS:
        with _open_text(path, _list_codec(path, encoding)) as file:
            return [name for name in _csv_header(file, path).names if name]
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
            if line.reason in (BROKEN_QUOTES, MORE_FIELDS):
                found.hint(f'{path.name}: write a caption that holds a separator or a quote as '
                           '"a ""big"" dog, sitting"')
        elif _is_undecoded(line.record, codec):
            found.drop(where, f"line not {codec.upper()}")
            found.hint(f"{path.name} is not {codec.upper()}: save it as UTF-8, or say what it is "
                       "with --data.encoding (Windows' of Western Europe is cp1252)")
        else:
            yield where, line.record


def _lines(path: Path, encoding: str | None) -> Iterator[_Line]:
    with _open_text(path, _list_codec(path, encoding)) as file:
        if path.suffix.lower() in JSON_ENDINGS:
            yield from _json_records(file, path)
        else:
            yield from _csv_lines(file, path)


def _open_text(path: Path, codec: str) -> TextIO:
    """Open a list behind its byte order mark, with the line ends that quoted captions may hold."""
    # UTF-8 marks its undecodable bytes, so that they can be told from a U+FFFD of the text
    errors = "surrogateescape" if codec == "utf-8" else "replace"
    file = path.open(encoding=codec, errors=errors, newline="")
    if codec == "utf-8" and file.read(1) != BYTE_ORDER_MARK:
        file.seek(0)
    return file


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
    codec = codecs.lookup(text_codec(head, encoding)).name
    # reading in pieces insists on a mark, without which decoding a whole text takes this order
    has_mark = text_codec(head) == codec
    return f"{codec}-le" if codec in ("utf-16", "utf-32") and not has_mark else codec


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
            yield _Line(number, None, TOO_LONG)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.lstrip(BYTE_ORDER_MARK))  # files put together by `cat`
        except (ValueError, RecursionError):  # not JSON, or a number of thousands of digits
            record = None
        yield _Line(number, record if isinstance(record, dict) else None)


def _json_records(file: TextIO, path: Path) -> Iterator[_Line]:
    """Read a record from each line, or one array of records, whichever ending the file has."""
    start = file.tell()
    is_array = re.match(r"\s*\[\s*\{", file.read(1 << 10))
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


class _Header(NamedTuple):
    names: list[str]
    delimiter: str
    lines: int


def _csv_header(file: TextIO, path: Path) -> _Header:
    """Read the line of names. DataError if two columns have the same, or if it is no such line."""
    stated = None
    number = 0
    head = "\n"
    while head and not head.strip():  # lines above the names: empty ones, or Excel's sep=;
        head = file.readline(MAX_TEXT_BYTES).lstrip(BYTE_ORDER_MARK)
        number += 1
        sep = re.fullmatch(r'"?sep=(.)"?', head.strip("\r\n"))
        if sep:
            stated = sep[1]
            head = "\n"
    delimiter = stated or max(DELIMITERS, key=head.count)  # of equally frequent ones the first
    try:
        fields = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error as error:
        raise DataError(f"{path}: its first line holds no names of columns ({error})") from None
    names = [name.strip() for name in fields]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{path}: two columns are called {name}; give each a name of its own")
    return _Header(names, delimiter, number)


def _csv_lines(file: TextIO, path: Path) -> Iterator[_Line]:
    header = _csv_header(file, path)
    # strict: a quote that is never closed would take the lines below it into the caption
    reader = csv.reader(file, delimiter=header.delimiter, skipinitialspace=True, strict=True)
    while True:  # not a for loop: an error in one line must not end the iteration
        number = reader.line_num + header.lines + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            end = reader.line_num + header.lines + 1
            too_long = number + 1 == end and "limit" in str(error)
            for lost in range(number, end):  # every line that it took is lost
                yield _Line(lost, None, TOO_LONG if too_long else BROKEN_QUOTES)
            continue
        if fields is None:
            return
        if any(field.strip() for field in fields[len(header.names):]):
            yield _Line(number, None, MORE_FIELDS)
        elif fields:
            pairs = zip(header.names, fields, strict=False)
            yield _Line(number, {name: field.strip() for name, field in pairs if name})
