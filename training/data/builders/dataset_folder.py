"""Folder of a built dataset: splits that `datasets.load_dataset` reads, data card, build.json."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError
from tokenloom_common.files import write_json_atomic
from tokenloom_common.outputs import check_output_folder
from training.data.sources.tables.hf_datasets import quiet_datasets

BUILD_NAME = "build.json"
FORMAT_VERSION = 1  # raise it when a builder makes other rows of the same arguments
GROUP_ROWS = 256  # a stream reads whole row groups
GROUP_BYTES = 64 << 20
SHARD_BYTES = 500_000_000
OWN_NAMES = {"data", "README.md", "ATTRIBUTION.md", BUILD_NAME}


def previous_build(out: str | Path, builder: str, arguments: Mapping[str, Any],
                   need_bytes: int = 0) -> dict[str, Any] | None:
    """Return the report of an earlier build with the same arguments; None if `out` may be written.

    need_bytes: room that a build takes at least. UserError if `out` cannot be written to, or holds
    anything but an earlier build of the same builder.
    """
    folder = Path(out)
    # an empty name is no folder, though Path("") is the working directory
    is_folder = bool(str(out)) and os.path.isdir(folder)  # False, not an error, of a long name
    earlier = _earlier_build(folder, builder, arguments) if is_folder else None
    if earlier is None:  # one that is reused may be where nothing can be written
        check_output_folder("--out", out, ("*",), need_bytes)
    return earlier


def _earlier_build(out: Path, builder: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    names = {item.name for item in out.iterdir()}
    if not names:
        return None

    record = _read_record(out)
    # never delete what a user may have put there
    if record is None or record.get("builder") != builder or not names <= OWN_NAMES:
        raise UserError(f"--out {out}: not empty, and not an earlier build of `tokenloom data "
                        f"{builder}` alone; give a new folder or empty this one")

    # other arguments: None, so that the builder replaces what is there
    is_same = (record.get("format") == FORMAT_VERSION
               and record.get("arguments") == dict(arguments))
    if not is_same:
        return None
    files = record.get("files", [])
    is_whole = bool(files) and all((out / name).is_file() for name in files)
    return record if is_whole else None


def _read_record(out: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((out / BUILD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_splits(folder: Path, splits: Mapping[str, list[dict[str, Any]]],
                 features: Any) -> list[str]:
    """Write one parquet file per split and return their names; an empty split gets no file."""
    from datasets import Dataset

    (folder / "data").mkdir()
    names = []
    for split, rows in splits.items():
        if rows:
            name = f"data/{split}-00000-of-00001.parquet"  # `datasets` finds the split in the name
            # with features: `datasets` would take an image for a plain record of bytes and path
            with quiet_datasets():
                Dataset.from_list(rows, features=features).to_parquet(folder / name)
            names.append(name)
    return names


class ShardWriter:
    """Write the rows of one split to parquet shards; memory holds no more than a row group."""

    def __init__(self, folder: Path, split: str, features: Any) -> None:
        self._pattern = f"data/{split}-{{:05d}}-of-{{:05d}}.parquet"
        self._folder = folder
        self._schema = features.arrow_schema  # it tells `datasets` which column is an image
        self._shards: list[Path] = []
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0  # of images in `_rows`
        self._shard_bytes = 0
        self._writer: Any = None

    def add(self, row: dict[str, Any], num_bytes: int) -> None:
        """Write a row. num_bytes: the size of its image."""
        self._rows.append(row)
        self._bytes += num_bytes
        if len(self._rows) == GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            path = self._folder / f"data/{len(self._shards)}-{uuid.uuid4().hex}.part"
            path.parent.mkdir(exist_ok=True)
            self._shards.append(path)
            self._writer = pq.ParquetWriter(path, self._schema)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._shard_bytes += self._bytes
        self._rows = []
        self._bytes = 0
        if self._shard_bytes >= SHARD_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self._shard_bytes = 0

    def finish(self) -> list[str]:
        """Write what is left, and return the names of the shards."""
        if self._rows:
            self._write_group()
        self._close()
        names = []
        for number, path in enumerate(self._shards):  # how many there are is known only now
            names.append(self._pattern.format(number, len(self._shards)))
            path.rename(self._folder / names[-1])
        return names


def write_record(folder: Path, builder: str, arguments: Mapping[str, Any], files: list[str],
                 report: Mapping[str, Any]) -> dict[str, Any]:
    """Write build.json and return its contents."""
    record = {"builder": builder, "format": FORMAT_VERSION, "arguments": dict(arguments),
              "files": files, **report}
    write_json_atomic(folder / BUILD_NAME, record)
    return record


def card_head(licence: str, names: list[str]) -> str:
    """Format the YAML block that opens a data card: licence, task, and the file of each split."""
    lines = ["---", f"license: {licence}", "task_categories:", "- text-to-image", "language:",
             "- en", "configs:", "- config_name: default", "  data_files:"]
    for split in dict.fromkeys(Path(name).name.split("-")[0] for name in names):
        lines += [f"  - split: {split}", f"    path: data/{split}-*"]
    return "\n".join([*lines, "---", ""])
