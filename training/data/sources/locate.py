"""Find the format, splits and files of a data set at a path; check paths that data names."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name
from training.data.sources.options import ReadOptions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
EXPECTED = ("a folder with metadata.jsonl or metadata.csv, a folder of pictures with same-name "
            ".txt files, parquet files, webdataset .tar shards (a file, a folder, or "
            "{000..012}.tar), or a hub id owner/name")
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation",
               "valid": "validation", "val": "validation", "dev": "validation", "test": "test",
               "testing": "test", "eval": "test", "evaluation": "test"}
MAX_BRACES = 100_000  # shards of one path; a typo such as {0..999999999} must not fill the memory
NAMED_MISSING = 5  # missing shards that an error names

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")  # the hub's names of files of a split


class FileLayout(NamedTuple):
    """Format and files of a data set."""

    format: str  # a key of READERS in open_dataset.py
    root: Path
    splits: dict[str, list[Path]]  # files, or the one folder, of each split

    def choose(self, split: str | None) -> list[Path]:
        """Return the files of a split; None is train, or the only split.

        UserError listing the splits if there is no such split.
        """
        if split:
            name = split
        elif "train" in self.splits or len(self.splits) > 1:
            name = "train"
        else:
            name = next(iter(self.splits))
        if name not in self.splits:
            raise UserError(f"{self.root}: no split '{name}'{nearest_name(name, self.splits)} "
                            f"(splits: {', '.join(self.splits)})")
        return self.splits[name]


def find_files(path: str | Path, options: ReadOptions) -> FileLayout:
    """Recognize the data set at a path, or a hub id.

    MissingFileError for a missing path, UserError for another kind of file, DataError for a folder
    without data.
    """
    options.check()
    text = str(path)
    root = Path(text).expanduser()
    if "{" in root.name and not root.exists():
        return _brace_files(text)
    if not root.exists():
        # after the local path: a folder owner/name beside the user wins over the hub
        if _HUB_ID.fullmatch(text):
            return FileLayout("hub", Path(text), {})
        raise MissingFileError(f"{text}: no such file or folder; expected {EXPECTED}")
    if root.is_file():
        if root.suffix not in (".parquet", ".tar"):
            kind = root.suffix or "nameless"
            raise UserError(f"{text}: a {kind} file is not a data set; expected {EXPECTED}")
        return FileLayout(root.suffix[1:], root.parent, split_files([root]))

    for extension in ("parquet", "tar"):
        # in the folder itself, in the hub's data/, or in a folder per split
        files = sorted([*root.glob(f"*.{extension}"), *root.glob(f"*/*.{extension}")])
        if files:
            return FileLayout(extension, root, split_files(files, root))
    return _image_folder(root)


def split_files(files: list[Path], root: Path | None = None) -> dict[str, list[Path]]:
    """Group files by split, as the hub names them.

    A split is named by NAME-00000-of-00003, by a first word such as train or test, or by a folder
    of such a name. Otherwise it is train.
    """
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_name(path, root), []).append(path)
    return splits


def _split_name(path: Path, root: Path | None) -> str:
    numbered = _NUMBERED.fullmatch(path.stem)
    if numbered:
        return numbered[1]
    # train.tar, train-00.tar, train_0.tar, train0.tar
    word = re.split(r"[-._ 0-9]", path.stem, maxsplit=1)[0].lower()
    if word in SPLIT_WORDS:
        return SPLIT_WORDS[word]
    if root is not None and path.parent != root:
        return SPLIT_WORDS.get(path.parent.name.lower(), "train")
    return "train"


def _image_folder(root: Path) -> FileLayout:
    """Recognize a folder of images, or of split folders with images."""
    formats = {}
    for folder in sorted(root.iterdir()):
        found = _image_folder_format(folder) if folder.is_dir() else None
        if found:
            formats[folder] = found
    own_format = _image_folder_format(root)
    # a folder with data of its own is no split folder, whatever the folders in it are called
    if own_format is None and any(folder.name.lower() in SPLIT_WORDS for folder in formats):
        return _split_folders(root, formats)

    if own_format is None and next(walk_files(root, (".txt",)), None):
        own_format = "sidecar"  # in folders further down, which are no splits
    if own_format is None:
        has_images = next(walk_files(root, IMAGE_SUFFIXES), None) is not None
        found = "pictures without captions" if has_images else "nothing readable"
        raise DataError(f"{root}: holds {found}; expected {EXPECTED}")
    return FileLayout(own_format, root, {"train": [root]})


def _split_folders(root: Path, formats: dict[Path, str]) -> FileLayout:
    if len(set(formats.values())) > 1:
        raise UserError(f"{root}: some split folders have metadata files and some have .txt files; "
                        "make them alike")
    splits: dict[str, list[Path]] = {}
    for folder in formats:
        name = SPLIT_WORDS.get(folder.name.lower(), folder.name)
        splits.setdefault(name, []).append(folder)
    for folders in splits.values():
        if len(folders) > 1:
            names = ", ".join(folder.name for folder in folders)
            raise UserError(f"{root}: the folders {names} are the same split; keep one")
    return FileLayout(next(iter(formats.values())), root, splits)


def _image_folder_format(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return "metadata"
    names = [name for name in os.listdir(folder) if (folder / name).is_file()]
    has_texts = any(name.endswith(".txt") for name in names)
    has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return "sidecar" if has_texts and has_images else None


def walk_files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below `root` with a suffix, sorted. Links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        # in place: os.walk goes on with what is left here, in this order
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield Path(folder, name)


def path_inside(root: Path, name: str) -> Path | None:
    """Return the path of a file that data names; None if the name leads out of `root`.

    Refused are absolute names, '..', URLs and links that lead outside.
    """
    # Windows' separator as well: there, such a name would lead outside
    if not name or Path(name).is_absolute() or ".." in re.split(r"[\\/]", name):
        return None
    return path_below(root, name)


def path_below(root: Path, name: str) -> Path | None:
    """Like `path_inside`, but accept an absolute path or '..' that ends up below `root`."""
    if "\0" in name or "://" in name:
        return None
    path = root / name  # name alone, if it is absolute
    # resolved, so that links and '..' count with where they lead
    return path if path.resolve().is_relative_to(root.resolve()) else None


def _brace_files(text: str) -> FileLayout:
    files = [Path(name).expanduser() for name in expand_braces(text)]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:NAMED_MISSING])
        if len(missing) > NAMED_MISSING:
            shown += f" and {len(missing) - NAMED_MISSING:,} more"
        raise MissingFileError(f"{text}: {len(missing):,} of {len(files):,} shards are missing "
                               f"({shown})")
    if any(path.suffix != ".tar" for path in files):
        raise UserError(f"{text}: braces are for .tar shards, such as {{000..012}}.tar")
    return FileLayout("tar", files[0].parent, {"train": files})


def expand_braces(text: str) -> list[str]:
    """'a-{08..10}.tar' -> a-08.tar, a-09.tar, a-10.tar; '{x,y}' -> x, y. UserError for others."""
    pieces: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", text):
        if part.startswith("{") and part.endswith("}"):
            pieces.append(_expand_brace(part, text))
        else:
            pieces.append([part])
    choices = itertools.product(*pieces)
    return ["".join(choice) for choice in itertools.islice(choices, MAX_BRACES)]


def _expand_brace(part: str, text: str) -> list[str]:
    numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if numbers:
        first = int(numbers[1])
        last = int(numbers[2])
        if 0 <= last - first < MAX_BRACES:
            width = len(numbers[1])  # leading zeros, as in a shell
            return [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in part:
        return part[1:-1].split(",")
    raise UserError(f"{text}: cannot read {part}; write {{000..012}} or {{a,b}}")
