"""Read folders of images: listed with their captions, with caption files, or a folder a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenloom_common.text_files import TextDecodeError, decode_text, text_codec
from training.data.sources.captions import caption_lines
from training.data.sources.collector import MAX_TEXT_BYTES, Collector, pop_captions
from training.data.sources.folders.metadata import ImageList
from training.data.sources.folders.sidecars import RECORD_ENDING, CaptionFile
from training.data.sources.locate import FileLayout
from training.data.sources.options import ReadOptions
from training.data.sources.tree import UNREAD_IMAGES, PathGuard


def read_lists(layout: FileLayout, split: str, options: ReadOptions) -> Collector:
    """Read the rows of a split of lists of images; a broken line costs that line only."""
    found = Collector()
    for path in layout.splits[split]:
        for row in ImageList(path, layout.tree, options).rows(split, found):
            captions = pop_captions(row.record, options)
            found.add(row.key, captions, row.record, image=_image_reference(row.image))
            if captions is None:
                columns = ", ".join(row.record) or "none but the image's name"
                found.hint(f"no column with captions; other columns: {columns}; name it with "
                           "--data.caption_column")
    return found


def read_sidecars(layout: FileLayout, split: str, options: ReadOptions) -> Collector:
    """Read images of one split with caption files beside them; every line is a caption."""
    found = Collector()
    images = layout.splits[split]
    guard = PathGuard(layout.root, options.follow_links)
    for image in images:
        key = image.relative_to(layout.root).as_posix()
        files = layout.captions.get(image, [])
        if not files:
            found.drop(key, "no caption file")
        elif _is_usable(found, guard, key, image, [file.path for file in files]):
            _add_captioned(found, key, image, files, options)

    folders = {image.parent for image in images}
    for path in layout.unused_captions:
        if path.parent in folders:
            found.drop(path.relative_to(layout.root).as_posix(), "no picture for the caption file")
    return found


def _is_usable(found: Collector, guard: PathGuard, key: str, image: Path, texts: list[Path]
               ) -> bool:
    for path in (image, *texts):
        # files come from a walk of the folder: nothing but a link can lead outside
        if path.is_symlink() and not guard.allows(path):
            found.drop(key, "path outside the folder")
            found.hint(f"{path.name} is a link to {os.path.realpath(path)}; "
                       "--data.follow_links true follows links")
            return False
        if not path.is_file():
            found.drop(key, "missing file")
            return False
        if not os.access(path, os.R_OK):
            found.drop(key, "unreadable")
            return False
    if any(path.stat().st_size > MAX_TEXT_BYTES for path in texts):
        found.drop(key, "caption file too large")
        return False
    return True


def _add_captioned(found: Collector, key: str, image: Path, files: list[CaptionFile],
                   options: ReadOptions) -> None:
    captions: object = None
    metadata: dict[str, Any] = {}
    for file in files:
        raw = file.path.read_bytes()
        try:
            text = decode_text(raw, options.encoding)
        except TextDecodeError as error:
            found.drop_undecoded(key, file.path.name, error)
            return
        found.encodings[text_codec(raw, options.encoding).upper()] += 1
        if file.ending == RECORD_ENDING:
            metadata = found.parse_record(text)
            captions = captions or pop_captions(metadata, options)
        else:
            captions = caption_lines(text)
    found.add(key, captions, metadata, image=_image_reference(image))


def read_classes(layout: FileLayout, split: str, options: ReadOptions) -> Collector:
    """Read images whose captions are the names of their folders: the outermost that differ."""
    found = Collector()
    tree = layout.tree
    images = layout.splits[split]
    guard = PathGuard(tree.root, options.follow_links)
    below = {folder: tree.image_splits.below(tree.relative(folder))
             for folder in tree.image_folders}
    wrappers = _wrapper_folders(set(below.values()))
    for image in images:
        key = str(tree.relative(image))
        names = below[image.parent]
        if len(names) <= wrappers:
            found.drop(key, "no class folder")
        elif _is_usable(found, guard, key, image, []):
            found.add(key, names[wrappers], {}, image=_image_reference(image))

    folders = {image.parent for image in images}
    for path in tree.others:
        here = path.parent in folders or path.parent not in tree.image_folders
        if here and path.suffix.lower() in UNREAD_IMAGES:
            found.drop(str(tree.relative(path)), f"{path.suffix.lower()} file, which is not read")
    return found


def _wrapper_folders(folders: set[tuple[str, ...]]) -> int:
    """Return how many outer folders, such as images/, hold all classes and are none."""
    folders = folders - {()}
    shared = 0
    for names in zip(*folders, strict=False):  # all outermost folders, then all below them, ...
        if len(set(names)) > 1:
            break
        shared += 1
    has_classes_below = any(len(names) > shared for names in folders)
    return shared if has_classes_below else max(0, shared - 1)


def _image_reference(path: Path) -> dict[str, Any]:
    try:
        return {"bytes": None, "path": str(path).encode().decode()}
    except UnicodeEncodeError:
        # a table cannot hold a file name that is not UTF-8; it can hold the file itself
        return {"bytes": path.read_bytes(), "path": None}
