"""MANIFEST.json of a checkpoint: its files with sizes and hashes, and the facts of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenloom_common.files import file_hash
from training.config.start_folders import MANIFEST

SCHEMA_VERSION = 1
RANKS = "ranks"  # folder with one file per process: random state and the task's own tensors


def file_entries(folder: Path) -> list[dict[str, Any]]:
    """Return name, size and hash of every file below a checkpoint folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [{"name": str(path.relative_to(folder)), "size": path.stat().st_size,
             "blake2b": file_hash(path)} for path in paths]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest. OSError or ValueError where it is missing or damaged."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def checkpoint_problem(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint folder; None if it is whole."""
    try:
        manifest = read_manifest(folder)
        schema = manifest["schema_version"]  # first: it says what the other keys mean
        if schema != SCHEMA_VERSION:
            age = "newer" if schema > SCHEMA_VERSION else "older"
            return f"its schema {schema} is {age} than this release reads ({SCHEMA_VERSION})"

        # without the random state of one process, a run would not resume to the bit
        ranks = sum(entry["name"].startswith(f"{RANKS}/") for entry in manifest["files"])
        if ranks != manifest["world_size"]:
            return f"it is of {manifest['world_size']} processes and holds the state of {ranks}"

        for entry in manifest["files"]:
            problem = _file_problem(folder / entry["name"], entry)
            if problem is not None:
                return f"{entry['name']} {problem}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        # the size first: a file that was cut short need not be hashed
        is_whole = path.stat().st_size == entry["size"] and file_hash(path) == entry["blake2b"]
    except OSError as error:
        return f"cannot be read ({str(error.strerror).lower()})"
    return None if is_whole else "is damaged"
