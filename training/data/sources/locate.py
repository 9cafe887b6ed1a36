"""What lies at a path: which kind of source, which splits, which files; and which paths may be followed."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
EXPECTED = ("a folder with metadata.jsonl or metadata.csv, a folder of pictures with same-name .txt files, parquet "
            "files, webdataset .tar shards (a file, a folder, or {000..012}.tar), or a hub id owner/name")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OF = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_KEYWORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
             "val": "validation", "dev": "validation", "test": "test", "testing": "test", "eval": "test",
             "evaluation": "test"}
_MAX_BRACES = 100_000


class Layout(NamedTuple):
    """A source: its kind (a key of the table in sources.py), its root, and per split a folder or a list of files."""

    kind: str
    root: Path
    splits: dict[str, list[Path]]

    def choose(self, split: str | None) -> list[Path]:
        """The files of a split; None is train, or the only one. UserError listing the splits otherwise."""
        name = split or ("train" if "train" in self.splits or len(self.splits) > 1 else next(iter(self.splits)))
        if name not in self.splits:
            raise UserError(f"{self.root}: no split '{name}'{nearest_name(name, self.splits)} "
                            f"(splits: {', '.join(self.splits)})")
        return self.splits[name]


def find_layout(path: str | Path) -> Layout:
    """Look at a path and say what it is. MissingFileError for a missing path, DataError for a folder without data."""
    text = str(path)
    root = Path(text).expanduser()
    if "{" in root.name and not root.exists():
        return _brace_layout(text)
    if not root.exists():
        if _HUB_ID.fullmatch(text):
            return Layout("hub", Path(text), {})
        raise MissingFileError(f"{text}: no such file or folder; expected {EXPECTED}")
    if root.is_file():
        if root.suffix not in (".parquet", ".tar"):
            raise UserError(f"{text}: a {root.suffix or 'nameless'} file is not a data set; expected {EXPECTED}")
        return Layout(root.suffix[1:], root.parent, split_files([root]))
    for kind in ("parquet", "tar"):
        files = sorted({*root.glob(f"*.{kind}"), *root.glob(f"data/*.{kind}"), *root.glob(f"*/*.{kind}")})
        if files:
            return Layout(kind, root, split_files(files, root))
    return _folder_layout(root)


def split_files(files: list[Path], root: Path | None = None) -> dict[str, list[Path]]:
    """Files by split, as the hub names them: NAME-00000-of-00003, a first word such as train or test, or a folder of
    that name. Where nothing says so, it is train."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        numbered = _OF.fullmatch(path.stem)
        word = re.split(r"[-._ 0-9]", path.stem, maxsplit=1)[0].lower()
        folder = path.parent.name.lower() if root is not None and path.parent != root else ""
        name = numbered[1] if numbered else _KEYWORDS.get(word) or _KEYWORDS.get(folder) or "train"
        splits.setdefault(name, []).append(path)
    return splits


def _folder_layout(root: Path) -> Layout:
    parts = {folder.name: [folder] for folder in sorted(root.iterdir()) if folder.is_dir() and _folder_kind(folder)}
    if not _folder_kind(root) and parts and any(name.lower() in _KEYWORDS for name in parts):
        kinds = sorted({_folder_kind(folder) or "" for (folder,) in parts.values()})
        if len(kinds) > 1:
            raise UserError(f"{root}: some split folders have metadata files and some have .txt files; make them alike")
        splits: dict[str, list[Path]] = {}
        for name, folders in parts.items():
            splits.setdefault(_KEYWORDS.get(name.lower(), name), []).extend(folders)
        twice = [", ".join(f.name for f in folders) for folders in splits.values() if len(folders) > 1]
        if twice:
            raise UserError(f"{root}: the folders {twice[0]} are the same split; keep one")
        return Layout(kinds[0], root, splits)
    kind = _folder_kind(root) or ("sidecar" if next(walk_files(root, (".txt",)), None) else None)
    if kind is None:
        pictures = next(walk_files(root, IMAGE_SUFFIXES), None) is not None
        found = "pictures without captions" if pictures else "nothing readable"
        raise DataError(f"{root}: holds {found}; expected {EXPECTED}")
    return Layout(kind, root, {"train": [root]})


def _folder_kind(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return "metadata"
    names = {name for name in os.listdir(folder) if (folder / name).is_file()}
    return "sidecar" if any(name.endswith(".txt") for name in names) and any(
        name.lower().endswith(IMAGE_SUFFIXES) for name in names) else None


def walk_files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files below `root` with one of the suffixes (any case), sorted, without following links to folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(folder, name)


def inside(root: Path, name: str) -> Path | None:
    """The path of a file that data names, or None if the name leads out of `root` (absolute, '..', a URL, a link)."""
    if not name or "\0" in name or "://" in name or Path(name).is_absolute() or ".." in re.split(r"[\\/]", name):
        return None
    return below(root, name)


def below(root: Path, name: str) -> Path | None:
    """Like `inside`, but an absolute path is fine if it ends up below `root`."""
    if "\0" in name or "://" in name:
        return None
    path = root / name
    return path if path.resolve().is_relative_to(root.resolve()) else None


def _brace_layout(text: str) -> Layout:
    files = [Path(name).expanduser() for name in expand_braces(text)]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise MissingFileError(f"{text}: {len(missing):,} of {len(files):,} shards are missing "
                               f"({', '.join(missing[:5])}{more})")
    if {path.suffix for path in files} - {".tar"}:
        raise UserError(f"{text}: braces are for .tar shards, such as {{000..012}}.tar")
    return Layout("tar", files[0].parent, {"train": files})


def expand_braces(text: str) -> list[str]:
    """'a-{08..10}.tar' -> a-08.tar, a-09.tar, a-10.tar; '{x,y}' lists. UserError if a brace cannot be read."""
    pieces: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", text):
        if not (part.startswith("{") and part.endswith("}")):
            pieces.append([part])
            continue
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers and 0 <= int(numbers[2]) - int(numbers[1]) < _MAX_BRACES:
            width = len(numbers[1])
            pieces.append([f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)])
        elif "," in part:
            pieces.append(part[1:-1].split(","))
        else:
            raise UserError(f"{text}: cannot read {part}; write {{000..012}} or {{a,b}}")
    return ["".join(choice) for choice in itertools.islice(itertools.product(*pieces), _MAX_BRACES)]
