"""index.jsonl beside pictures: one line per picture, with its file's name and recipe.

It is only added to, a whole line at a time, by any number of commands. Free of heavy imports, so
that a command can refuse a foreign file within a moment of its start.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloom_common.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from inference.image_files.recipe import Recipe

NAME = "index.jsonl"
_BLOCK_BYTES = 1 << 20


def check_index(out: Path) -> None:
    """Raise UserError if --out has a file of that name which is no index of pictures."""
    path = out / NAME
    if not os.path.lexists(path):
        return
    foreign_index = UserError(f"--out {out}: its {NAME} was not written by this command; "
                              "give another folder")
    if not path.is_file():
        raise foreign_index
    try:
        with path.open("r+b") as file:  # for writing, since lines are to be added
            first = file.readline(_BLOCK_BYTES)
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise UserError(f"--out {out}: its {NAME} cannot be written to ({reason})") from None
    # a first line without its end was cut when it was written: it is repaired
    if first.endswith(b"\n") and _file_and_values(first) is None:
        raise foreign_index
    if first and not first.endswith(b"\n") and not first.startswith(b'{"file": '):
        raise foreign_index


class PictureIndex:
    """The index of a folder, to which pictures are added."""

    def __init__(self, out: Path) -> None:
        self.path = out / NAME
        self._is_whole = False  # not known yet

    def add(self, picture: Path, recipe: Recipe) -> None:
        """Add a picture that is in place. RunFailedError with the path and the reason."""
        line = json.dumps({"file": picture.name, **recipe.values()}).encode() + b"\n"
        try:
            if not self._is_whole:
                self._cut_torn_line()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                # one call: lines of processes that write at once do not mix
                written = os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunFailedError(f"{self.path}: could not be written ({error.strerror}); "
                                 "pictures saved before it are whole") from None
        if written < len(line):
            raise RunFailedError(f"{self.path}: could not be written (no space left on device); "
                                 "pictures saved before it are whole")

    def pictures(self) -> tuple[Counter[str], set[str]]:
        """Return how often each picture (`picture_key`) is there, and the names of their files.

        Of several lines of a file the last one counts. Pictures whose file is gone are left out.
        """
        from inference.image_files.recipe import Recipe

        latest: dict[str, dict] = {}
        try:
            with self.path.open("rb") as file:
                for line in file:
                    indexed = _file_and_values(line)
                    if indexed is not None:
                        name, values = indexed
                        latest[name] = values
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

        found: Counter[str] = Counter()
        names = {name for name in latest if (self.path.parent / name).is_file()}
        for name in names:
            with suppress(UserError):  # a line that somebody changed
                recipe = Recipe.parse(json.dumps(latest[name]))
                found[picture_key(recipe, Path(name).suffix)] += 1
        return found, names

    def _cut_torn_line(self) -> None:
        """Cut a last line that a stop of the machine or a full disk left without its end."""
        self._is_whole = True
        try:
            file = self.path.open("r+b")
        except FileNotFoundError:
            return
        with file:
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read() == b"\n":
                return
            newline = -1
            while newline < 0 and end > 0:  # backwards, a block at a time
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                end = start
            file.truncate(end + newline + 1)  # 0 where there is no line's end
        print(f"{self.path}: its last line was cut when it was written, and has been removed",
              file=sys.stderr)


def picture_key(recipe: Recipe, ending: str) -> str:
    """Return a text that is the same for the same picture in the same file format."""
    return json.dumps([ending, recipe.identity()], sort_keys=True)


def _file_and_values(line: bytes) -> tuple[str, dict] | None:
    """Return a line's file and recipe; None for a line that is none of an index."""
    try:
        values = json.loads(line)
        name = values.pop("file")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return None
    is_name = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
    return (name, values) if is_name and "prompt" in values else None
