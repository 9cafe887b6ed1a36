"""Lists of images with their captions: metadata.jsonl, .csv, .tsv, .parquet, or of another name."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tokenloom_common.errors import DataError, UserError
from training.data.sources.collector import (
    IMAGE_COLUMNS,
    Collector,
    find_name,
    pick_captions,
    shown_names,
)
from training.data.sources.folders.list_lines import list_columns, parquet_columns, read_records
from training.data.sources.left_out import SPLIT_COLUMNS, stated_split
from training.data.sources.options import ReadOptions
from training.data.sources.splits import file_split, held_out
from training.data.sources.tree import FileTree, PathGuard, is_file

NAME_COLUMNS = ("file_name", "filename", "image_file_name", "image_name", "image", "img",
                "image_path", "img_path", "image_file", "file_path", "filepath", "file", "path",
                "picture")
"""Usual columns with the names of images; `datasets` calls it file_name."""


SHOWN_CHARS = 300  # of a path that was made up


class Row(NamedTuple):
    """A row that names an image which is there."""

    key: str
    image: Path
    record: dict[str, Any]  # without the name


class ImageList:
    """One list of images, and the folder whose images it names."""

    def __init__(self, path: Path, tree: FileTree, options: ReadOptions) -> None:
        self.path = path
        self.tree = tree
        self.options = options
        self.guard = PathGuard(tree.root, options.follow_links)

    @cached_property
    def columns(self) -> list[str]:
        """Names of its columns; none if it cannot be read."""
        return list_columns(self.path, self.options.encoding)

    @cached_property
    def name_column(self) -> str | None:
        """Column with the names of the images, if one is known."""
        return find_name(self.columns, self.options.image_column, NAME_COLUMNS)

    @cached_property
    def split_column(self) -> str | None:
        """Column with the splits of the rows, if there is one."""
        return find_name(self.columns, None, SPLIT_COLUMNS)

    @property
    def has_captions(self) -> bool:
        """Whether a column with captions is known."""
        return pick_captions(dict.fromkeys(self.columns, "x"), self.options) is not None

    def own_split(self) -> str | None:
        """Return the split that the list's folder or name says, if any."""
        relative = self.tree.relative(self.path)
        by_folder = self.tree.image_splits.split(relative.parent)
        by_name = file_split(relative.stem)
        if by_folder is None and by_name is None:
            return None
        return held_out((by_folder, by_name))

    @cached_property
    def _rows_differ(self) -> bool:
        """Whether rows may belong to several splits."""
        folders = map(self.tree.relative, self.tree.image_folders)
        return self.split_column is not None or any(map(self.tree.image_splits.split, folders))

    def splits(self) -> list[str]:
        """Return the splits that its rows belong to."""
        own = self.own_split()
        if not self._rows_differ:  # they need not be looked at
            return [own or "train"]
        records = read_records(self.path, Collector(), self.options.encoding)
        found = dict.fromkeys(self._row_split(record, own) for _, record in records)
        return list(found) or [own or "train"]

    def rows(self, split: str, found: Collector) -> Iterator[Row]:
        """Yield the rows of a split that name an image; count the others.

        UserError listing the columns if none is known to name images.
        """
        if self.name_column is None:
            if not self.columns:
                raise DataError(f"{self.path}: no line of it can be read: give it lines of JSON "
                                "objects, or names of columns above its values")
            listed = shown_names(self.columns)
            chosen = self.options.image_column
            if chosen is not None:
                raise UserError(f"{self.path}: no column '{chosen}' (columns: {listed})")
            raise UserError(f"{self.path}: no column with the names of the images (file_name or "
                            f"image); columns: {listed}; name it with --data.image_column")
        own = self.own_split()
        for where, record in read_records(self.path, found, self.options.encoding):
            if self._rows_differ and self._row_split(record, own) != split:
                continue
            name = record.pop(self.name_column, None)
            if not isinstance(name, str) or not name:
                found.drop(where, f"no {self.name_column}")
                continue
            image = self._image(name)
            if image is None:
                found.drop(f"{where} ({name})", "path outside the folder")
            elif not is_file(image):
                found.drop(self._key(name), "missing file")
                found.hint(f"looked for {str(image)[:SHOWN_CHARS]}")
            else:
                yield Row(self._key(name), image, record)

    def _row_split(self, record: dict[str, Any], own: str | None) -> str:
        """Return the split of a row: what its column, its image's folder or the list holds out."""
        stated = stated_split(record.get(self.split_column or ""))
        name = record.get(self.name_column or "")
        by_folder = None
        if isinstance(name, str) and name:
            image = self._image(name)
            if image is not None and image.is_relative_to(self.tree.root):
                by_folder = self._folder_split(image)
        return held_out((stated, by_folder, own))

    def _key(self, name: str) -> str:
        """Return the name of an image below the root of the data."""
        folder = self.tree.relative(self.path).parent
        return name if folder == PurePosixPath(".") else f"{folder}/{name}"

    def _image(self, name: str) -> Path | None:
        """Return the path of a named image, which may be missing; None if it is not allowed."""
        folder = self.path.parent
        path = self.guard.inside(folder, name)
        if path is None or is_file(path):
            return path
        # written on Windows; or as seen from the root of the data
        name = name.replace("\\", "/")
        for other in (folder / name, self.tree.root / name):
            if is_file(other):
                return other if self.guard.allows(other) else None
        images = self._loosely_named(_loose(posixpath.normpath(name)))
        if len(images) > 1 and self.own_split() is not None:  # train.csv beside train/ and val/
            images = [image for image in images if self._folder_split(image) == self.own_split()]
        return images[0] if len(images) == 1 else path

    def _folder_split(self, image: Path) -> str | None:
        return self.tree.image_splits.split(self.tree.relative(image.parent))

    def _loosely_named(self, name: str) -> list[Path]:
        stem, ending = posixpath.splitext(name)
        with_ending = [image for image in self._by_loose_name.get(stem, [])
                       if image.suffix.lower() == ending]
        return with_ending or self._by_loose_name.get(name, [])

    @cached_property
    def _by_loose_name(self) -> dict[str, list[Path]]:
        """Images by their names without outer folders and without ending, in any case.

        Those below the list's folder, or all where none lies there.
        """
        below = [image for image in self.tree.images if image.is_relative_to(self.path.parent)]
        found: dict[str, list[Path]] = {}
        for image in below or self.tree.images:
            parts = self.tree.relative(image).with_suffix("").parts
            for start in range(len(parts)):
                found.setdefault(_loose("/".join(parts[start:])), []).append(image)
        return found


def _loose(name: str) -> str:
    """Fold the case, which Windows ignores, and accents to one form: macOS takes them apart."""
    return unicodedata.normalize("NFC", name).casefold()


def is_list_of_images(path: Path, tree: FileTree, options: ReadOptions) -> bool:
    """Whether a file has columns that name images and hold captions."""
    if not tree.images:
        return False
    images = ImageList(path, tree, options)
    try:
        return images.name_column is not None and images.has_captions
    except DataError:  # no list at all, but something that lies beside the data
        return False


def image_tables(paths: Sequence[Path], options: ReadOptions) -> list[Path]:
    """Return the parquet files with images in them, and those that cannot be read beside such."""
    columns = {path: parquet_columns(path) for path in paths}
    with_images = [path for path in paths
                   if find_name(columns[path], options.image_column, IMAGE_COLUMNS)]
    return [path for path in paths if path in with_images or (with_images and not columns[path])]
