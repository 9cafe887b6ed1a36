"""What all processes of a run must have alike, on every machine: their settings, their data, and one folder to write in.

Each process reads its own command line and its own disks. Where two of them differ, collectives would no longer match, or
half of a checkpoint would be on another machine: the run is refused before that, in one line that names key, rank and machine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenloom_common.config import by_dotted_name
from tokenloom_common.errors import UserError
from training.engine.processes import Processes, shared

APPEARS_SECONDS = 10.0
"""Network file systems show a file of another machine late; one that is not there after so long is on another disk."""
NAMED = 3  # differing keys in a message


def check_same(group: Processes, values: dict[str, Any], what: str) -> None:
    """UserError on every process if one has other `values` (JSON-able) than the first. All processes must call it."""
    flat = by_dotted_name(values)
    digest = hashlib.blake2b(json.dumps(flat, sort_keys=True).encode(), digest_size=16).hexdigest()
    if len(set(group.gather(digest))) == 1:
        return
    everyone = group.gather((digest, platform.node(), flat))
    rank = next(rank for rank, (found, *_) in enumerate(everyone) if found != everyone[0][0])
    (_, host, first), (_, other_host, other) = everyone[0], everyone[rank]
    differing = [f"{name} {first.get(name)} and {other.get(name)}" for name in {**first, **other}
                 if first.get(name) != other.get(name)][:NAMED]
    raise shared(UserError(f"{what} differs between rank 0 ({host}) and rank {rank} ({other_host}): {'; '.join(differing)}; "
                           "start the same command with the same files on every machine"))


def check_shared(group: Processes, folder: Path, named: str) -> None:
    """Create `folder` and see that every process finds there what the first one writes. UserError on every process if not.

    named: how the user named it, for the message.
    """
    if group.world_size == 1:
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    name = group.first_does(lambda: _leave_mark(folder))
    everyone = group.gather((platform.node(), _appears(folder / name)))
    group.first_does(lambda: (folder / name).unlink())
    blind = [f"rank {rank} ({host})" for rank, (host, seen) in enumerate(everyone) if not seen]
    if not blind:
        return
    if group.is_first:
        with suppress(OSError):  # something else came into it
            for path in missing:
                path.rmdir()
    more = f" and {len(blind) - NAMED} more" if len(blind) > NAMED else ""
    raise shared(UserError(f"{named}: {', '.join(blind[:NAMED])}{more} does not see what rank 0 ({everyone[0][0]}) "
                           "writes there; give a folder that all machines share, by its whole path"))


def _leave_mark(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".shared-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + APPEARS_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


