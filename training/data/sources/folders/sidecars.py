"""Caption files beside images: which belongs to which."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tokenloom_common.errors import UserError
from tokenloom_common.text_files import decode_text
from training.data.sources.collector import pick_captions
from training.data.sources.options import ReadOptions
from training.data.sources.tree import FileTree, counted

CAPTION_ENDINGS = (".txt", ".caption")
FIRST_RECORDS = 20  # that are looked at for captions
RECORD_ENDING = ".json"  # a downloader's record, with the caption among other facts


class CaptionFile(NamedTuple):
    """A file that may hold the captions of the image beside it."""

    rank: int  # of its ending: the record comes last
    path: Path
    ending: str


def caption_endings(options: ReadOptions) -> tuple[str, ...]:
    """Return the endings of files that hold captions, in lower case."""
    if options.caption_ending is None:
        return CAPTION_ENDINGS
    return ("." + options.caption_ending.strip().lstrip(".").lower(),)


def find_captions(tree: FileTree, options: ReadOptions
                  ) -> tuple[dict[Path, list[CaptionFile]], list[Path]]:
    """Return the caption files of each image that has some, and those without an image.

    The caption file of cat.png is cat.txt or cat.png.txt; a record cat.json comes after it.
    UserError if an image has two caption files.
    """
    endings = (*caption_endings(options), RECORD_ENDING)
    by_stem: dict[Path, list[CaptionFile]] = {}
    for path in [*tree.others, *tree.lists]:  # a chosen ending may be that of a list
        for rank, ending in enumerate(endings):
            if path.name.lower().endswith(ending):
                stem = path.with_name(path.name[:-len(ending)] or path.name)
                by_stem.setdefault(stem, []).append(CaptionFile(rank, path, ending))
                break

    captions: dict[Path, list[CaptionFile]] = {}
    for image in tree.images:
        files = sorted(by_stem.pop(image, []) + by_stem.get(image.with_suffix(""), []))
        if files:
            _refuse_two(image, [file for file in files if file.ending != RECORD_ENDING])
            captions[image] = files

    used = {file.path for files in captions.values() for file in files}
    folders = {image.parent for image in tree.images}
    unused = [file.path for files in by_stem.values() for file in files
              if file.ending != RECORD_ENDING and file.path not in used
              and file.path.parent in folders]
    return captions, sorted(unused)


def _refuse_two(image: Path, files: list[CaptionFile]) -> None:
    if len(files) < 2:
        return
    first, second = files[:2]
    way_on = "keep one of them"
    if first.ending != second.ending:
        way_on = (f"choose with --data.caption_ending {first.ending} or "
                  f"--data.caption_ending {second.ending}")
    raise UserError(f"{image}: has two caption files, {first.path.name} and {second.path.name}; "
                    f"{way_on}")


def describe_captions(captions: dict[Path, list[CaptionFile]]) -> str:
    """Format as '8 images with .txt files'."""
    endings = Counter(files[0].ending for files in captions.values())
    return " and ".join(f"{counted(count, 'image')} with {ending} files"
                        for ending, count in endings.most_common())


def has_captions(captions: dict[Path, list[CaptionFile]], options: ReadOptions) -> bool:
    """Whether some image has a caption file, or one of the first records beside them a caption."""
    records = []
    for files in captions.values():
        if files[0].ending != RECORD_ENDING:
            return True
        records.append(files[0].path)
    for path in records[:FIRST_RECORDS]:
        if not path.is_file():  # a pipe would be waited for
            continue
        try:
            record = json.loads(decode_text(path.read_bytes(), options.encoding))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(record, dict) and pick_captions(record, options) is not None:
            return True
    return False
