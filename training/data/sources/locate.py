"""Find the format, splits and files of a data set at a path."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from tokenloom_common.errors import DataError, MissingFileError, UserError, nearest_name
from training.data.sources.folders.advice import advice_for, is_document, refuse_file
from training.data.sources.folders.metadata import ImageList, image_tables, is_list_of_images
from training.data.sources.folders.sidecars import (
    CaptionFile,
    describe_captions,
    find_captions,
    has_captions,
)
from training.data.sources.options import EXPECTED, FORMATS, ReadOptions
from training.data.sources.splits import SplitFolders
from training.data.sources.tree import (
    LIST_SUFFIXES,
    METADATA_NAME,
    TAR_SUFFIXES,
    FileTree,
    counted,
    hub_blobs,
    walk_tree,
)

MAX_BRACES = 100_000  # shards of one path; a typo such as {0..999999999} must not fill the memory
NAMED_MISSING = 5  # missing shards that an error names

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FileLayout:
    """Format and files of a data set, and why it was taken for that."""

    format: str  # a key of READERS in open_dataset.py
    root: Path
    splits: dict[str, list[Path]]  # files of each split: shards, lists, images or folders
    reason: str
    tree: FileTree = field(default_factory=lambda: FileTree(Path()))  # of a folder of images
    captions: dict[Path, list[CaptionFile]] = field(default_factory=dict)  # of each image
    unused_captions: list[Path] = field(default_factory=list)

    def choose(self, split: str | None) -> str:
        """Return the name of a split; None is train, or the only split.

        UserError listing the splits if there is no such split.
        """
        only = next(iter(self.splits)) if len(self.splits) == 1 else "train"
        name = split or only
        if name not in self.splits:
            raise UserError(f"{self.root}: no split '{name}'{nearest_name(name, self.splits)} "
                            f"(splits: {', '.join(self.splits)})")
        return name


def find_files(path: str | Path, options: ReadOptions) -> FileLayout:
    """Recognize the data set at a path, or a hub id. Paths are names, never patterns.

    MissingFileError for a missing path, UserError for another kind of file and for a folder that
    may be meant in several ways, DataError for a folder without data.
    """
    options.check()
    text = str(path)
    root = _home(text)
    if root.is_dir():
        return _find_in_folder(root, options)
    if root.is_file():
        return _single_file(root, text, options)
    if "{" in text:
        return _brace_files(text)
    # after the local path: a folder owner/name beside the user wins over the hub
    if _HUB_ID.fullmatch(text):
        return FileLayout("hub", Path(text), {}, "a data set of the hub")
    pattern = ("; a path is a name, not a pattern: give the folder, or shards as {000..012}.tar"
               if re.search(r"[*?\[]", text) else "")
    raise MissingFileError(f"{text}: no such file or folder{pattern}; expected {EXPECTED}")


def _home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~NAME of no user of this machine is a name like any other
        return Path(text)


def _single_file(path: Path, text: str, options: ReadOptions) -> FileLayout:
    root = path.parent
    name = path.name.lower()
    is_list = name.endswith((*LIST_SUFFIXES, ".json")) and not is_document(path)
    if name.endswith(".parquet"):
        kind = "parquet"
        is_list = not image_tables([path], options)
    elif name.endswith(TAR_SUFFIXES):
        kind = "tar"
    elif not is_list:
        refuse_file(path, text)
    if is_list:
        tree = walk_tree(root, options.follow_links)
        if not name.endswith(".parquet") or is_list_of_images(path, tree, options):
            return _list_layout(tree, [path], options)
    return FileLayout(kind, root, split_files([path], root), f"a {kind} file")


def split_files(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Group shards by split, as their folders below `root` and their own names say."""
    relative = [PurePosixPath(path.relative_to(root).as_posix()) for path in files]
    folders = SplitFolders(path.parent for path in relative)
    splits: dict[str, list[Path]] = {}
    for path, below in zip(files, relative, strict=True):
        splits.setdefault(folders.split_of_file(below), []).append(path)
    return splits


# ---- folders


def _find_in_folder(root: Path, options: ReadOptions) -> FileLayout:
    tree = walk_tree(root, options.follow_links)
    candidates = _candidates(tree, options)
    if options.format is not None:
        if options.format not in candidates:
            others = _described(candidates) or "none of the other formats"
            raise UserError(f"{root}: holds no {FORMATS[options.format]}, as --data.format "
                            f"{options.format} says; found {others}{advice_for(tree, options)}")
        return candidates[options.format]

    candidates.pop("classes", None)  # every image lies in some folder: only on request
    if not candidates:
        found = "pictures without captions" if tree.images else "nothing readable"
        raise DataError(f"{root}: holds {found}{advice_for(tree, options)}; expected {EXPECTED}")
    if len(candidates) > 1:
        choices = " or ".join(f"--data.format {name}" for name in candidates)
        raise UserError(f"{root}: may be read in several ways ({_described(candidates)}); choose "
                        f"with {choices}")
    layout = next(iter(candidates.values()))
    if hub_blobs(root) is not None:
        return replace(layout, reason=f"{layout.reason}, links into the hub's cache")
    return layout


def _described(candidates: dict[str, FileLayout]) -> str:
    return "; ".join(layout.reason for layout in candidates.values())


def _candidates(tree: FileTree, options: ReadOptions) -> dict[str, FileLayout]:
    """Return the formats that a folder may have been meant to be in, by name."""
    found: dict[str, FileLayout] = {}
    if tree.saved:
        found["saved"] = FileLayout("saved", tree.root, split_files(tree.saved, tree.root),
                                    counted(len(tree.saved), "folder") + " of save_to_disk")
    if tree.tars:
        found["tar"] = FileLayout("tar", tree.root, split_files(tree.tars, tree.root),
                                  counted(len(tree.tars), "tar shard"))
    if tree.images:
        images = _images_by_split(tree)
        found["classes"] = FileLayout("classes", tree.root, images,
                                      counted(len(tree.images), "image") + " in folders", tree)
        captions, unused = find_captions(tree, options)
        if has_captions(captions, options):
            found["sidecar"] = FileLayout("sidecar", tree.root, images,
                                          describe_captions(captions), tree, captions, unused)

    others = found.keys() - {"classes"}
    shards = tree.parquet
    if others or tree.images or tree.lists:
        # a downloader leaves tables of what it did beside its shards
        shards = image_tables(tree.parquet, options)
    tables = [path for path in tree.parquet if path not in shards]
    # the usual name is meant unless something else is; another needs columns that can be used
    lists = [path for path in [*tree.lists, *tables] if path.stem.lower() == METADATA_NAME]
    if others or shards or not lists:
        lists = [path for path in lists or [*tree.lists, *tables]
                 if is_list_of_images(path, tree, options)]
    if lists:
        found["metadata"] = _list_layout(tree, lists, options)

    if not shards and not lists and not others:
        shards = tables  # whose reader says which columns they have
    if shards:
        found["parquet"] = FileLayout("parquet", tree.root, split_files(shards, tree.root),
                                      counted(len(shards), "parquet file"))
    return found


def _images_by_split(tree: FileTree) -> dict[str, list[Path]]:
    split_of = {folder: tree.image_splits.split(tree.relative(folder)) or "train"
                for folder in tree.image_folders}
    splits: dict[str, list[Path]] = {}
    for image in tree.images:
        splits.setdefault(split_of[image.parent], []).append(image)
    return splits


def _list_layout(tree: FileTree, lists: list[Path], options: ReadOptions) -> FileLayout:
    splits: dict[str, list[Path]] = {}
    for path in lists:
        for split in ImageList(path, tree, options).splits():
            splits.setdefault(split, []).append(path)
    for paths in splits.values():
        folders = [path.parent for path in paths]
        if len(set(folders)) < len(folders):
            names = " and ".join(str(tree.relative(path)) for path in paths[:3])
            raise UserError(f"{tree.root}: {names} are lists of the same images; give the one that "
                            "is meant as --data.path")
    names = ", ".join(str(tree.relative(path)) for path in lists[:3])
    return FileLayout("metadata", tree.root, splits, f"the list of images {names}", tree)


# ---- braces


def _brace_files(text: str) -> FileLayout:
    files = [_home(name) for name in expand_braces(text)]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:NAMED_MISSING])
        if len(missing) > NAMED_MISSING:
            shown += f" and {len(missing) - NAMED_MISSING:,} more"
        raise MissingFileError(f"{text}: {len(missing):,} of {len(files):,} shards are missing "
                               f"({shown})")
    if not all(path.name.endswith(TAR_SUFFIXES) for path in files):
        raise UserError(f"{text}: braces are for .tar shards, such as {{000..012}}.tar")
    root = Path(os.path.commonpath([path.parent for path in files]))
    return FileLayout("tar", root, split_files(files, root), counted(len(files), "tar shard"))


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
