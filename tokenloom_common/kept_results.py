"""Results that take time to find again, kept in a JSON file below the user's cache folder.

A file that cannot be read or written is the same as none: results are then found anew each time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError, one_line
from tokenloom_common.files import write_json_atomic

log = logging.getLogger(__name__)

CALIBRATION_NAME = "calibration.json"  # of `inference.decoder.choices`
FORMAT = 1  # another one is not read
MOST_RESULTS = 512  # the oldest leave
MOST_BYTES = 1 << 20


class KeptResults:
    """JSON values by key in the file `name` of the cache folder.

    Processes may write at the same time: one after another, held by a lock file beside it. The file
    is replaced whole, so that a reader, which does not wait, sees one or the other.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def path(self) -> Path | None:
        """The file; None for a user without a home. Read anew, since the environment decides."""
        folder = cache_folder()
        return None if folder is None else folder / self.name

    def get(self, key: str) -> Any | None:
        """Return the value of a key, None if there is none. A caller checks it: a user may edit."""
        return self._read().get(key)

    def put(self, key: str, value: Any, may_replace: Callable[[Any], bool] | None = None) -> None:
        """Keep a value if the file can be written, and forget the oldest above MOST_RESULTS.

        may_replace: asked whether the value that is kept for the key may go; None: it may.
        """
        path = self.path
        if path is None:
            return
        try:
            with self._locked(path):
                results = self._read()
                if key in results and may_replace is not None and not may_replace(results[key]):
                    return
                results.pop(key, None)  # the newest is last
                results[key] = value
                self._write(path, results)
        except OSError as error:
            log.debug("%s: not kept (%s)", path, one_line(error))

    def check_writable(self) -> Path:
        """Return the file, made if it is not there. UserError if it cannot be written."""
        path = self.path
        if path is None:
            raise UserError("no folder for caches; set XDG_CACHE_HOME to one")
        try:
            with self._locked(path):
                self._write(path, self._read())
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({one_line(error)}); set XDG_CACHE_HOME "
                            "to a folder that can") from None
        return path

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Let one process at a time read and write; the others wait, which takes a moment."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the system when the file is closed
            yield

    def _write(self, path: Path, results: dict[str, Any]) -> None:
        newest = dict(list(results.items())[-MOST_RESULTS:])
        write_json_atomic(path, {"format": FORMAT, "results": newest})

    def _read(self) -> dict[str, Any]:
        """Return what is kept, in the order in which it was; nothing from a file that is not ours.

        Such a file is replaced when the next result is kept.
        """
        path = self.path
        if path is None:
            return {}
        try:
            if path.stat().st_size > MOST_BYTES:
                return {}
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            log.debug("%s: nothing read (%s)", path, one_line(error))
            return {}

        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return {}
        results = content.get("results")
        return results if isinstance(results, dict) else {}


def cache_folder() -> Path | None:
    """Return $XDG_CACHE_HOME/tokenloom or ~/.cache/tokenloom; None for a user without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the specification ignores a relative one
        return Path(named) / "tokenloom"
    try:
        return Path.home() / ".cache" / "tokenloom"
    except RuntimeError:
        return None


def versions(*packages: str) -> str:
    """Return names and versions of installed packages and of Tokenloom, as a part of a key."""
    parts = []
    for package in (*packages, "tokenloom"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # such as a checkout that is not installed
            parts.append(f"{package} ?")
    return ", ".join(parts)


@lru_cache(maxsize=8)
def source_hash(folder: Path) -> str:
    """Return a hash of a folder's Python files, so that a key ends with the code it is of."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
