"""The files below a folder, found in one walk, and the links that it may follow."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NoReturn

from tokenloom_common.errors import UserError
from training.data.sources.splits import SplitFolders

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")
UNREAD_IMAGES = (".tif", ".tiff", ".heic", ".avif", ".jxl", ".jp2", ".svg", ".npy", ".psd")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LIST_SUFFIXES = (".jsonl", ".csv", ".tsv")
SAVED_STATE = "state.json"  # of a folder of `Dataset.save_to_disk`
METADATA_NAME = "metadata"  # of lists of images, as `datasets` calls them
_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # but those that stand for other bytes
_PASSED_OVER = "__MACOSX"  # the resource forks that macOS puts into archives


@dataclass
class FileTree:
    """The files below a folder, by what they may be; hidden ones are passed over.

    Within a folder they are sorted, and a folder comes before the folders in it.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)  # folders of `Dataset.save_to_disk`
    others: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)  # to folders, and not followed

    def add(self, path: Path) -> None:
        """Add one file."""
        name = path.name.lower()
        if name.endswith(IMAGE_SUFFIXES):
            self.images.append(path)
        elif name.endswith(TAR_SUFFIXES):
            self.tars.append(path)
        elif name.endswith(".parquet"):
            self.parquet.append(path)
        # another .json file may be the record of a single image
        elif name.endswith(LIST_SUFFIXES) or name == f"{METADATA_NAME}.json":
            self.lists.append(path)
        else:
            self.others.append(path)

    def relative(self, path: Path) -> PurePosixPath:
        """Return a path as it is below the root."""
        return PurePosixPath(path.relative_to(self.root).as_posix())

    @cached_property
    def image_splits(self) -> SplitFolders:
        """The splits that the folders of the images are."""
        return SplitFolders(self.relative(folder) for folder in self.image_folders)

    @cached_property
    def image_folders(self) -> list[Path]:
        """The folders that hold images, in order."""
        return list(dict.fromkeys(image.parent for image in self.images))

    def endings(self) -> Counter[str]:
        """Count the files by their endings."""
        files = [*self.images, *self.tars, *self.parquet, *self.lists, *self.others]
        return Counter(path.suffix.lower() or "without ending" for path in files)


def counted(count: int, noun: str) -> str:
    """Format as '1 image' or '8 images'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def walk_tree(root: Path, follow_links: bool) -> FileTree:
    """Find the files below a folder. Links to folders are followed on request, each once."""
    tree = FileTree(root)
    for folder, names in walk_folders(root, follow_links, tree.links):
        if SAVED_STATE in names and any(name.endswith(".arrow") for name in names):
            tree.saved.append(folder)
            continue
        for name in names:
            tree.add(folder / name)
    shards = [*tree.tars, *tree.parquet, *(folder / SAVED_STATE for folder in tree.saved)]
    for path in [*shards, *tree.lists]:
        _check_readable(path)
    for path in shards:
        try:
            str(path).encode()
        except UnicodeEncodeError:  # no table can hold it, and no reader of Arrow open it
            raise UserError(f"{str(path)!a}: a name that is not UTF-8; rename it") from None
    return tree


def _check_readable(path: Path) -> None:
    """Raise UserError for what is no file, such as a pipe, which a reader would wait for."""
    if not path.is_file():
        what = "a link to nothing" if path.is_symlink() else "not a file but a device or a pipe"
        raise UserError(f"{path}: {what}; remove it, or put the file there")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permission denied); make it readable")


def walk_folders(root: Path, follow_links: bool, passed_over: list[Path]
                 ) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder with its sorted file names; put links that are not followed aside."""
    real_root = Path(os.path.realpath(root))
    seen = {real_root}  # links may lead in circles, or to the same folder twice
    for name, folders, files in os.walk(root, onerror=_refuse, followlinks=follow_links):
        folder = Path(name)
        going_on = []
        for child in sorted(folders):
            if child.startswith(".") or child == _PASSED_OVER:
                continue
            if (folder / child).is_symlink():
                real = Path(os.path.realpath(folder / child))
                if real.is_relative_to(real_root) or real_root.is_relative_to(real):
                    continue  # its files are found where they are, or it leads in a circle
                if not follow_links:
                    passed_over.append(folder / child)
                if not follow_links or real in seen:
                    continue
                seen.add(real)
            going_on.append(child)
        folders[:] = going_on  # in place: os.walk goes on with what is left here, in this order
        yield folder, sorted(file for file in files if not file.startswith("."))


def _refuse(error: OSError) -> NoReturn:
    """Raise the error of a folder that cannot be listed, which os.walk would pass over."""
    raise error


def is_file(path: Path) -> bool:
    """Whether there is a file; False also where data name what cannot be a path at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a lone surrogate
        return False


class PathGuard:
    """Files that a data set may name or link to: those below its folder, and on request any others.

    A snapshot in the hub's cache holds links to the blobs beside it, which are part of it.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root
        self.follow_links = follow_links
        self._allowed = [root.resolve()]
        blobs = hub_blobs(root)
        if blobs is not None:
            self._allowed.append(blobs)

    def allows(self, path: Path) -> bool:
        """Whether a file of the data set may be read, after links and '..' are resolved."""
        if self.follow_links:
            # a link that the owner made may lead anywhere; a name in the data may not
            path = Path(os.path.normpath(path))
            if path.is_relative_to(os.path.normpath(self.root)):
                return True
        resolved = Path(os.path.realpath(path))  # Path.resolve raises for links in circles
        return any(resolved.is_relative_to(folder) for folder in self._allowed)

    def inside(self, folder: Path, name: str) -> Path | None:
        """Return the path of a file that data in `folder` names; None if it is not allowed.

        Refused are absolute names, '..', URLs and links that lead outside.
        """
        # Windows' separator as well: there, such a name would lead outside
        parts = name.replace("\\", "/").split("/")
        if not name or Path(name).is_absolute() or ".." in parts:
            return None
        return self.below(folder, name)

    def below(self, folder: Path, name: str) -> Path | None:
        """Like `inside`, but accept an absolute path or '..' that ends up at an allowed file."""
        if "\0" in name or "://" in name or _SURROGATES.search(name):
            return None
        path = folder / name  # name alone, if it is absolute
        return path if self.allows(path) else None


def hub_blobs(root: Path) -> Path | None:
    """Return the blobs of the hub's cache that a folder in snapshots/REVISION belongs to."""
    absolute = root.resolve()
    for folder in (absolute, *absolute.parents):
        blobs = folder.parent.parent / "blobs"
        # blobs that are a link are not the hub's, and could lead anywhere
        if folder.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None
