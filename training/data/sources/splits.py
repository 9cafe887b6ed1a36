"""Which split a file belongs to, by the names of its folders and its own."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation",
               "valid": "validation", "val": "validation", "dev": "validation", "test": "test",
               "testing": "test", "eval": "test", "evaluation": "test"}
HELD_OUT = ("validation", "test")
MAX_OTHER_SPLITS = 3  # folders beside a lone `train` that are splits by their own names

_WORDS = "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
_THINGS = r"images?|imgs?|pictures?|photos?|data|dataset|set|split|shards?"
# train, val2017, test_images, images-train, validation set; not `test tube`, which is a class
_SPLIT_FOLDER = re.compile(
    rf"(?:(?:{_THINGS})[-_. ]?)?({_WORDS})(?:[-_. ]?(?:\d+|{_THINGS}))*", re.IGNORECASE)
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")  # the hub's names of files of a split


@functools.lru_cache  # a column of splits repeats a few values
def folder_split(name: str) -> str | None:
    """Return the split that a folder of this name is, if its name says so."""
    match = _SPLIT_FOLDER.fullmatch(name)
    return SPLIT_WORDS[match[1].lower()] if match else None


def file_split(stem: str) -> str | None:
    """Return the split that a shard or a list of this name belongs to, if its name says so.

    NAME-00000-of-00003 is of split NAME; otherwise any word counts: cc3m-validation-0007.
    """
    numbered = _NUMBERED.fullmatch(stem)
    if numbered:
        return SPLIT_WORDS.get(numbered[1].lower(), numbered[1])
    words = re.split(r"[^A-Za-z]+", stem)
    return next((SPLIT_WORDS[word.lower()] for word in words if word.lower() in SPLIT_WORDS), None)


def held_out(splits: Iterable[str | None]) -> str:
    """Return the first split that is not train: what anything holds out is held out."""
    return next((split for split in splits if split and split != "train"), "train")


class SplitFolders:
    """The splits of the files of one data set, from the folders that hold them.

    A folder with the name of a split is that split, however deep its files lie. The neighbours of
    `train` are splits by their own names (`unseen_style`), unless there are many and none of them
    is held out: then all are classes, one of them of trains. Without `train`, they are it.
    """

    def __init__(self, folders: Iterable[PurePosixPath]) -> None:
        """folders: those that hold files, relative to the data set."""
        children: dict[PurePosixPath, set[str]] = {}
        for folder in folders:
            for parent, name in _steps(folder):
                children.setdefault(parent, set()).add(name)
        self._names = {parent: splits for parent, names in children.items()
                       if (splits := _split_names(names))}

    def split(self, folder: PurePosixPath) -> str | None:
        """Return the split of the files in a folder, if any folder on the way to it is one."""
        return self._find(folder)[1]

    def below(self, folder: PurePosixPath) -> tuple[str, ...]:
        """Return the names of the folders below the one that is the split, from the outermost."""
        return folder.relative_to(self._find(folder)[0]).parts

    def _find(self, folder: PurePosixPath) -> tuple[PurePosixPath, str | None]:
        """Return the outermost folder that is a split, and which; `train/val` is held out."""
        found: tuple[PurePosixPath, str | None] = (PurePosixPath("."), None)
        for parent, name in _steps(folder):
            split = self._names.get(parent, {}).get(name)
            if split and split != "train":
                return parent / name, split
            if split and found[1] is None:
                found = (parent / name, split)
        return found

    def split_of_file(self, path: PurePosixPath) -> str:
        """Return the split of a shard or list; 'train' if neither its folders nor its name say.

        What either of them holds out is held out.
        """
        by_folder = self.split(path.parent)
        by_name = file_split(path.name.partition(".")[0])
        if by_folder == "train" and by_name not in HELD_OUT:  # `train/part-00000-of-00004`
            return by_folder
        return held_out((by_folder, by_name))


def _steps(folder: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    """Yield each folder on the way to `folder` with the name below it, from the outermost."""
    parent = PurePosixPath(".")
    for name in folder.parts:
        yield parent, name
        parent /= name


def _counterparts(names: set[str]) -> dict[str, str]:
    """Return the splits of names that are equal but for the word: DIV2K_train_HR, DIV2K_valid_HR.

    Not of `train station` and `test tube`, which are classes.
    """
    alike: dict[tuple[str, str], dict[str, str]] = {}  # by what is around the word
    for name in names:
        for word in re.finditer(r"[a-z]+", name.lower()):
            split = SPLIT_WORDS.get(word[0])
            if split:
                rest = (name[:word.start()].lower(), name[word.end():].lower())
                alike.setdefault(rest, {})[name] = split

    found: dict[str, str] = {}
    for group in alike.values():
        if len(set(group.values())) > 1:
            found |= group
    return found


def _split_names(names: set[str]) -> dict[str, str]:
    """Return the splits that neighbouring folders are; empty where they are no splits."""
    known = {name: split for name in names if (split := folder_split(name))} | _counterparts(names)
    others = names - known.keys()
    if not known or (set(known.values()) == {"train"} and len(others) > MAX_OTHER_SPLITS):
        return {}
    has_train = "train" in known.values()
    return {**known, **{name: name if has_train else "train" for name in others}}
