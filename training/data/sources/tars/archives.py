"""Compressed tar shards: unpacked once into the cache of `datasets`, and read from there.

    tokenloom-tar/ID.tar  beside the indexes; ID changes with the shard
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import shutil
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloom_common.files import sync_path
from training.data.sources.tables.hf_datasets import (
    cache_failure,
    cache_folder,
    cache_name,
    check_cache,
)

log = logging.getLogger(__name__)

OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""By a file's first bytes: its ending may be wrong."""
UNPACK_INSTEAD = ", or unpack the shards yourself"


class BrokenArchiveError(Exception):
    """A compressed shard that cannot be unpacked to its end."""


def tar_folder() -> Path:
    """Return where unpacked shards and indexes of shards are kept."""
    return cache_folder() / "tokenloom-tar"


def plain_tar(shard: Path) -> Path:
    """Return the shard itself, or what it unpacks to. BrokenArchiveError; OSError of the shard.

    RunFailedError if the cache of `datasets` cannot be written or is full.
    """
    with shard.open("rb") as file:
        start = file.read(max(map(len, OPENERS)))
    opener = next((OPENERS[magic] for magic in OPENERS if start.startswith(magic)), None)
    if opener is None:
        return shard
    target = tar_folder() / f"{cache_name(shard)}.tar"
    if not target.is_file():
        _unpack(shard, opener, target)
    return target


def _unpack(shard: Path, opener: Callable[..., Any], target: Path) -> None:
    stat = shard.stat()
    check_cache(stat.st_size, UNPACK_INSTEAD)
    log.info("%s: unpacking it into the cache of datasets", shard)
    # a name of its own: other processes may be unpacking the same shard
    aside = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        with opener(shard, "rb") as packed, aside.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
        sync_path(aside)
        # the time of the shard, since the time of a file is part of the identity of the data
        os.utime(aside, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(aside, target)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise cache_failure(error, stat.st_size, UNPACK_INSTEAD) or BrokenArchiveError from None
    finally:
        aside.unlink(missing_ok=True)
