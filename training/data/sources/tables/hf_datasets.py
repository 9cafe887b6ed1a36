"""Hugging Face `datasets`: silence it, and check the cache in which it keeps copies."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenloom_common.errors import DataError, RunFailedError, one_line

FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
STREAM_INSTEAD = ", or --data.streaming true"


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Switch off progress bars and warnings of `datasets` and the hub's client within the block."""
    from datasets.utils.logging import (
        disable_progress_bar,
        enable_progress_bar,
        is_progress_bar_enabled,
    )

    # both are global: leave them as the caller had them
    bars_were_on = is_progress_bar_enabled()
    hub_log = logging.getLogger("huggingface_hub")
    own_log = logging.getLogger("datasets")
    levels = hub_log.level, own_log.level
    disable_progress_bar()
    hub_log.setLevel(logging.ERROR)
    own_log.setLevel(logging.CRITICAL)  # it logs errors, with paths of its own, and raises them
    try:
        yield
    finally:
        hub_log.setLevel(levels[0])
        own_log.setLevel(levels[1])
        if bars_were_on:
            enable_progress_bar()


def cache_folder() -> Path:
    """Return the cache of `datasets`."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def cache_name(path: Path, *facts: object) -> str:
    """Hash a file by path, size, time and inode, with other facts: a changed one is not reused."""
    stat = path.stat()
    known = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, *facts)
    return hashlib.blake2b(repr(known).encode(), digest_size=16).hexdigest()


def check_cache(needed: int, way_on: str = "") -> None:
    """Raise RunFailedError if the cache cannot be written, or has less room than `needed` bytes.

    way_on: what else than another folder helps, such as STREAM_INSTEAD.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # the mode bits say nothing of a read-only disk
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_be_written(error, way_on) from None
    if free < needed:
        raise _is_full(needed, way_on)


def cache_failure(error: BaseException, needed: int = 0, way_on: str = ""
                  ) -> RunFailedError | None:
    """Return what went wrong with the cache behind an exception; None if it is something else."""
    from datasets import config

    caches = (str(config.HF_CACHE_HOME), str(cache_folder()))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            if cause.errno in FULL:  # nothing else is written
                return _is_full(needed, way_on)
            in_cache = str(cause.filename).startswith(caches)
            if cause.errno in NOT_WRITABLE and in_cache:
                return _cannot_be_written(cause, way_on)
        cause = cause.__cause__ or cause.__context__
    return None


def unreadable(error: Exception, failure: str) -> DataError:
    """Return the error for data that `datasets` cannot read, with the cause that it wraps."""
    cause = error.__cause__ or error
    return DataError(f"{failure}: {one_line(cause)[:300]}")


def _cannot_be_written(error: OSError, way_on: str) -> RunFailedError:
    reason = (error.strerror or str(error)).lower()
    return RunFailedError(f"the cache of datasets at {cache_folder()} cannot be written ({reason})"
                          f": set HF_HOME to a folder that can{way_on}")


def _is_full(needed: int, way_on: str) -> RunFailedError:
    free = shutil.disk_usage(cache_folder()).free
    taken = f"take {_size(needed)}" if free < needed else "take more once they are unpacked"
    return RunFailedError(f"the cache of datasets at {cache_folder()} is full: {_size(free)} free, "
                          f"these files {taken}; set HF_HOME to a folder on a larger disk{way_on}")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
