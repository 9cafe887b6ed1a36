"""Check where a command will write, before it does any work: the place exists or can be made, takes
files, has room, and holds nothing that would be lost.

Free of heavy imports, so that a command can refuse within a moment of its start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenloom_common.errors import UserError
from tokenloom_common.files import refuse_others

BLOCK_BYTES = 4096
"""Written to try a place, and the least room that any file takes on a disk."""
ASIDE = ".12345678.tmp"
"""As long as what atomic writing adds to a name: `.NAME.<8 digits>.tmp`."""


def check_output_folder(flag: str, path: str | Path, own: Sequence[str] | None = None,
                        need_bytes: int = 0, replaced: bool = True) -> Path:
    """Return the folder to write; UserError, naming the option, if it cannot be. Makes nothing.

    own: None for a folder to which files are added; else name patterns of what it may hold.
    need_bytes: room that the results take at least.
    replaced: whether a folder of `own` is written aside and renamed (atomic_folder); False: in
        place.
    """
    folder = _existing_kind(flag, path, "folder")
    if own is not None:
        try:
            refuse_others(folder, own)
        except OSError as error:  # a folder that may not be listed
            raise _unusable(flag, path, "folder", _reason(error)) from None
        except UserError as error:  # it begins with the path
            raise UserError(f"{flag} {error}") from None

    if own is None or not replaced:
        _try_to_write(flag, path, folder / "x", need_bytes, "folder")
        return folder
    # beside the folder, where it is written first; through a link, beside what it leads to
    place = folder.resolve() if folder.is_symlink() else folder
    if os.path.ismount(place):
        raise UserError(f"{flag} {path}: is a mount point, which cannot be replaced as a whole; "
                        f"give a folder in it, such as {Path(path) / 'out'}")
    _try_to_write(flag, path, place, need_bytes, "folder")
    return folder


def check_output_file(flag: str, path: str | Path,
                      is_earlier: Callable[[Path], bool] | None = None) -> Path:
    """Return the file to write; UserError, naming the option, if it cannot be. Makes nothing.

    is_earlier: whether a file that is there is an earlier result, the only one to be replaced; None
        where the caller decides.
    """
    file = _existing_kind(flag, path, "file")
    _try_to_write(flag, path, file, 0, "file")
    is_filled = file.exists() and file.stat().st_size > 0
    if is_earlier is not None and is_filled and not is_earlier(file):
        raise UserError(f"{flag} {path}: exists and is not a report of this command; give another "
                        "file")
    return file


def is_json_with(path: Path, key: str) -> bool:
    """Whether a file is a JSON object that has a key, by which reports are told."""
    try:
        return key in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def given_value(argv: Sequence[str], *flags: str) -> str | None:
    """Return the last value of an option in unparsed arguments; None if it is not given.

    None also where help is asked for.
    """
    if {"-h", "--help"} & set(argv):
        return None
    value = None
    for index, argument in enumerate(argv):
        flag, has_value, text = argument.partition("=")
        if flag in flags:
            following = argv[index + 1:index + 2]  # empty at the end
            value = text if has_value else next(iter(following), None)
    return value


def _existing_kind(flag: str, path: str | Path, kind: str) -> Path:
    """Return the path. UserError if it is empty, no path, or something else than `kind`."""
    if not str(path):  # Path("") would be the working directory
        raise UserError(f"{flag} is empty; give a {kind}")
    # here it would be a folder of that name, and some libraries would write to home
    home = os.path.expanduser(path)
    if home != str(path):
        raise UserError(f"{flag} {path}: ~ means home in a shell alone; write {home}")

    place = Path(path)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)  # pathlib takes a name that no path can have for one that is not there
        if place.is_symlink() and not place.exists():
            target = os.readlink(place)
            raise UserError(f"{flag} {path}: is a link to {target}, which does not exist; make "
                            f"that, or give another {kind}")
        is_folder = place.is_dir()
        # a device or a pipe is no file that can be replaced
        is_file = place.is_file()
        exists = place.exists()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise _unusable(flag, path, kind, _reason(error)) from None

    if exists and kind == "folder" and not is_folder:
        raise UserError(f"{flag} {path}: is a file; give a folder")
    if is_folder and kind == "file":
        raise UserError(f"{flag} {path}: is a folder; give a file's name")
    if exists and kind == "file" and not is_file:
        raise UserError(f"{flag} {path}: is no regular file; give a file's name")
    return place


def _try_to_write(flag: str, path: str | Path, place: Path, need_bytes: int, kind: str) -> None:
    """Write a file like `place` in the nearest folder that exists, and take everything away again.

    Tried, not asked: permissions alone do not tell (a superuser, a read-only disk, a quota).
    """
    place = place.absolute()
    existing = place.parent
    missing: list[str] = []
    try:
        while not os.path.lexists(existing):
            missing.append(existing.name)
            existing = existing.parent
        if not existing.is_dir():
            what = "a file" if existing.exists() else "a link to nothing"
            raise _unusable(flag, path, kind, f"{existing} is {what}")
        # a folder of its own, so that processes which try at once do not meet
        with tempfile.TemporaryDirectory(dir=existing, prefix=".try-") as trial:
            folder = Path(trial).joinpath(*reversed(missing))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{place.name}{ASIDE}").write_bytes(b"0" * BLOCK_BYTES)
        free = shutil.disk_usage(existing).free
    except OSError as error:
        reason = f"nothing can be made in {existing}: {_reason(error)}"
        raise _unusable(flag, path, kind, reason) from None
    if free < need_bytes:
        raise UserError(f"{flag} {str(path)[:200]}: not enough room: at least {_size(need_bytes)} "
                        f"are needed and {_size(free)} free; free some, or give another {kind}")


def _unusable(flag: str, path: str | Path, kind: str, reason: str) -> UserError:
    shown = str(path)[:200]  # a name that is too long
    return UserError(f"{flag} {shown}: cannot be written to ({reason[:300]}); give another {kind}")


def _reason(error: OSError | ValueError) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _size(count: int) -> str:
    """Format bytes in the unit that gives a readable number: 3.2 GiB."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
