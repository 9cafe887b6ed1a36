"""What an encoding run has to do, and what of it is done: so that a run that was stopped goes on after its last whole shard.

    .OUT.tmp/plan.json                what is encoded with what, and how rows are cut into shards
    .OUT.tmp/train-00003-of-00010.arrow   a whole shard (written aside and renamed)
    .OUT.tmp/train-00003-of-00010.json    its rows, size and hash, and what was passed over for it: written after it
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

PLAN = "plan.json"
NOTES = "*-?????-of-?????.json"
FAILED = ".failed-"
"""Beginning of the name of a file that a process leaves which met an error, so that the others do not work on for hours."""


class Shard(NamedTuple):
    """Rows of a split that become one file. number, of: of the split's shards."""

    split: str
    number: int
    of: int
    rows: range

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.split}-{self.number:05d}-of-{self.of:05d}{SUFFIX}"


class DoneShard(NamedTuple):
    """A shard that is written, none if not one of its pictures could be used; `dropped`: [key, reason] of those."""

    file: ShardFile | None
    dropped: list[tuple[str, str]]


def cut(split: str, rows: int, shard_rows: int) -> list[Shard]:
    """The shards of a split."""
    starts = range(0, rows, shard_rows)
    return [Shard(split, number, len(starts), range(start, min(rows, start + shard_rows)))
            for number, start in enumerate(starts)]


def prepare(aside: Path, facts: dict[str, Any]) -> int:
    """Make the folder, or keep what an earlier run with the same facts left in it -> rows per shard.

    facts["shard_rows"] is what the first run chose; a run on another number of processes keeps to it. ResumeError when what is
    there is of other facts.
    """
    for mark in aside.glob(f"{FAILED}*"):
        mark.unlink()
    try:
        earlier = json.loads((aside / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if isinstance(earlier, dict):
        theirs, ours = ({name: value for name, value in by_dotted_name(one).items() if name != "shard_rows"}
                        for one in (earlier, _plain(facts)))
        changed = [f"{name} {theirs.get(name)} then, {ours.get(name)} now" for name in {**theirs, **ours}
                   if theirs.get(name) != ours.get(name)][:3]
        if changed:
            count = len(list(aside.glob(f"*{SUFFIX}")))
            raise ResumeError(f"{aside} holds {count:,} shards of an encoding that was stopped and had other settings "
                              f"({'; '.join(changed)}): use the same, delete that folder to start over, or give another --out")
        if isinstance(earlier.get("shard_rows"), int):
            log.info("%s: going on with what an earlier run encoded", aside)
            return earlier["shard_rows"]
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_json_atomic(aside / PLAN, facts)
    return facts["shard_rows"]


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(facts))


def mark_done(aside: Path, shard: Shard, done: DoneShard) -> None:
    """Write down that a shard is whole."""
    write_json_atomic(_beside(aside, shard), {"file": done.file and done.file.plain(), "dropped": done.dropped})


def find_done(aside: Path, shard: Shard) -> DoneShard | None:
    """What is known of a shard that is done; None, with a warning, when its file is damaged, and where there is none."""
    path = _beside(aside, shard)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        file = None if facts["file"] is None else ShardFile.parse(facts["file"], str(path))
        done = DoneShard(file, [(key, reason) for key, reason in facts["dropped"]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read; encoding its shard again", path)
        return None
    if file is not None:
        found = aside / file.name
        if not found.is_file() or found.stat().st_size != file.size or file_hash(found) != file.blake2b:
            log.warning("%s: missing or damaged; encoding it again", found)
            return None
    return done


def _beside(aside: Path, shard: Shard) -> Path:
    return aside / f"{Path(shard.name).stem}.json"


def remove_notes(folder: Path) -> None:
    """Leave only what token shards are made of."""
    for path in [folder / PLAN, *folder.glob(NOTES)]:
        path.unlink(missing_ok=True)


def check_whole(aside: Path, files: list[ShardFile]) -> None:
    """RunFailedError when a file that was written is not there any more as it was."""
    for file in files:
        path = aside / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            raise RunFailedError(f"{path}: changed after it was written; is another run encoding into the same folder?")


def reasons(done: list[DoneShard]) -> Counter[str]:
    """Why pictures were passed over, and how often."""
    return Counter(reason for one in done for _, reason in one.dropped)
