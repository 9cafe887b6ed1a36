"""Check what all processes of a run must have alike, on every machine.

That is their settings, their data, and one folder to write in. Each process reads its own command
line and its own disks. Where two of them differ, collectives would no longer match, or half of a
checkpoint would be on another machine: the run is refused before that, in one line that names key,
rank and machine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.config import by_dotted_name
from tokenloom_common.errors import UserError
from training.engine.processes import Processes, shared

APPEARS_SECONDS = 10.0
"""Network file systems show another machine's file late; after so long it is on another disk."""
NAMED = 3  # differing keys in a message


class _Settings(NamedTuple):
    digest: str
    host: str
    values: dict[str, Any]


def check_same(group: Processes, values: dict[str, Any], what: str) -> None:
    """UserError on every process if one has other `values` (JSON-able) than the first.

    All processes must call it. what: the name of the values, for the message.
    """
    flat = by_dotted_name(values)
    text = json.dumps(flat, sort_keys=True)  # another order of keys is no difference
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if len(set(group.gather(digest))) == 1:
        return

    # only now the values themselves: nearly all runs agree, and have sent a digest alone
    gathered = group.gather((digest, platform.node(), flat))
    everyone = [_Settings(*settings) for settings in gathered]
    first = everyone[0]
    rank, other = next((rank, settings) for rank, settings in enumerate(everyone)
                       if settings.digest != first.digest)

    differing = []
    for name in {**first.values, **other.values}:
        ours, others = first.values.get(name), other.values.get(name)
        if ours != others:
            differing.append(f"{name} {ours} and {others}")
    raise shared(UserError(f"{what} differs between rank 0 ({first.host}) and rank {rank} "
                           f"({other.host}): {'; '.join(differing[:NAMED])}; start the same "
                           "command with the same files on every machine"))


def check_shared(group: Processes, folder: Path, named: str) -> None:
    """Create `folder` and check that every process finds there what the first one writes.

    UserError on every process if not. named: how the user named the folder, for the message.
    """
    if group.world_size == 1:
        return

    missing = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    name = group.first_does(lambda: _leave_mark(folder))
    everyone = group.gather((platform.node(), _appears(folder / name)))
    # all have looked by now, since gather waits for the slowest
    group.first_does(lambda: (folder / name).unlink())

    first_host, _ = everyone[0]
    blind = [f"rank {rank} ({host})" for rank, (host, sees) in enumerate(everyone) if not sees]
    if not blind:
        return

    if group.is_first:  # leave no trace of a refused run
        with suppress(OSError):  # something else came into a folder
            for path in missing:
                path.rmdir()
    more = f" and {len(blind) - NAMED} more" if len(blind) > NAMED else ""
    raise shared(UserError(f"{named}: {', '.join(blind[:NAMED])}{more} does not see what rank 0 "
                           f"({first_host}) writes there; give a folder that all machines share, "
                           "by its whole path"))


def _leave_mark(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    # a name that no other disk's folder can have by chance, or from an earlier run
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
