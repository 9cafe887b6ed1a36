"""Progress of an encoding run on disk, so that a stopped run continues after its last whole shard.

    .OUT.tmp/plan.json                    settings of the run, and its rows per shard
    .OUT.tmp/train-00003-of-00010.arrow   a whole shard (written aside and renamed)
    .OUT.tmp/train-00003-of-00010.json    its record: rows, size, hash and dropped images; written
                                          after the shard
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.config import by_dotted_name
from tokenloom_common.errors import ResumeError, RunFailedError
from tokenloom_common.files import file_hash, write_json_atomic
from training.data.tokens.shards import SUFFIX, ShardFile

log = logging.getLogger(__name__)

SETTINGS_NAME = "plan.json"
RECORDS = "*-?????-of-?????.json"
FAILURE_MARK = ".failed-"
"""Start of the name of a file that a failed process leaves, so that the other processes stop too
instead of working on for hours."""


class Shard(NamedTuple):
    """Rows of a split that become one file: shard `number` of the split's `of` shards."""

    split: str
    number: int
    of: int
    rows: range

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}{SUFFIX}"


class FinishedShard(NamedTuple):
    """Record of a finished shard; `file` is None if every image was dropped.

    dropped: [key, reason] of the dropped images.
    """

    file: ShardFile | None
    dropped: list[tuple[str, str]]


def cut_into_shards(split: str, rows: int, shard_rows: int) -> list[Shard]:
    """Cut a split of `rows` rows into shards of `shard_rows`; the last may be shorter."""
    starts = range(0, rows, shard_rows)
    shards = []  # none of an empty split
    for number, start in enumerate(starts):
        stop = min(rows, start + shard_rows)
        shards.append(Shard(split, number, len(starts), range(start, stop)))
    return shards


def prepare_folder(aside: Path, settings: dict[str, Any]) -> int:
    """Create the folder, or keep what an earlier run left in it, and return the rows per shard.

    A run on another number of processes keeps the "shard_rows" that the first run chose.
    ResumeError if the earlier run had other settings.
    """
    # marks of an earlier failure would stop this run at its first batch
    for mark in aside.glob(f"{FAILURE_MARK}*"):
        mark.unlink()

    earlier = _read_settings(aside)
    if earlier is not None:
        _check_same_settings(aside, earlier, settings)
        shard_rows = earlier.get("shard_rows")
        if isinstance(shard_rows, int):
            log.info("%s: going on with what an earlier run encoded", aside)
            return shard_rows

    # without settings nobody knows what the shards there were encoded with
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_json_atomic(aside / SETTINGS_NAME, settings)
    return settings["shard_rows"]


def _read_settings(aside: Path) -> dict[str, Any] | None:
    """Settings of the earlier run; None if there was none, or they cannot be read."""
    try:
        settings = json.loads((aside / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _check_same_settings(aside: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
    """ResumeError naming up to three settings, apart from "shard_rows", that are not the same."""
    then = by_dotted_name(earlier)
    # a round trip, so that a tuple equals the list that JSON made of it
    now = by_dotted_name(json.loads(json.dumps(settings)))

    changed = []
    for name in {**then, **now}:  # also what only one of the two runs has
        if name != "shard_rows" and then.get(name) != now.get(name):
            changed.append(f"{name} {then.get(name)} then, {now.get(name)} now")
    if changed:
        count = len(list(aside.glob(f"*{SUFFIX}")))
        raise ResumeError(f"{aside} holds {count:,} shards of an encoding that was stopped and had "
                          f"other settings ({'; '.join(changed[:3])}): use the same, delete that "
                          "folder to start over, or give another --out")


def mark_done(aside: Path, shard: Shard, done: FinishedShard) -> None:
    """Write the record of a finished shard. Call it last: a shard without it is encoded again."""
    file = None if done.file is None else done.file.plain()
    write_json_atomic(_record_path(aside, shard), {"file": file, "dropped": done.dropped})


def find_done(aside: Path, shard: Shard) -> FinishedShard | None:
    """Return the record of a finished shard, or None if the shard has to be encoded.

    Logs a warning if the record or the shard's file is damaged.
    """
    path = _record_path(aside, shard)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        file = None
        if record["file"] is not None:
            file = ShardFile.parse(record["file"], str(path))
        dropped = [(key, reason) for key, reason in record["dropped"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read; encoding its shard again", path)
        return None

    # it may have been cut or deleted since; the size first, since hashing reads the whole file
    if file is not None:
        found = aside / file.name
        if not _has_size(found, file) or file_hash(found) != file.blake2b:
            log.warning("%s: missing or damaged; encoding it again", found)
            return None
    return FinishedShard(file, dropped)


def _record_path(aside: Path, shard: Shard) -> Path:
    return (aside / shard.name).with_suffix(".json")


def _has_size(path: Path, file: ShardFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def check_whole(aside: Path, files: list[ShardFile]) -> None:
    """RunFailedError if a file is gone or has another size than when it was written."""
    for file in files:
        path = aside / file.name
        if not _has_size(path, file):
            raise RunFailedError(f"{path}: changed after it was written; is another run encoding "
                                 "into the same folder?")


def remove_records(folder: Path) -> None:
    """Remove settings and records, which are no part of finished token shards."""
    for path in [folder / SETTINGS_NAME, *folder.glob(RECORDS)]:
        path.unlink(missing_ok=True)


def count_drop_reasons(done: list[FinishedShard]) -> Counter[str]:
    """Count the dropped images of all shards by reason."""
    return Counter(reason for shard in done for _, reason in shard.dropped)
