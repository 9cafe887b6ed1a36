"""The annotations of published data sets: the captions and the split of each image; COCO's JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom_common.errors import DataError, UserError
from tokenloom_common.text_files import TextDecodeError, decode_text
from training.data.sources.splits import SPLIT_WORDS, file_split
from training.data.sources.tree import IMAGE_SUFFIXES, PathGuard, walk_folders


class Item(NamedTuple):
    """An image as annotations have it. path: its file, where it is known without a search."""

    name: str
    captions: list[object]
    split: str
    columns: dict[str, Any]
    path: Path | None = None


@dataclass(frozen=True)
class AnnotatedFolder:
    """A folder to import: its annotation files, where its images are, problems met on the way."""

    root: Path
    images: Path
    files: list[Path]
    encoding: str | None = None
    follow_links: bool = False
    problems: Counter = field(default_factory=Counter)

    def image_files(self, links: list[Path] | None = None) -> Iterator[Path]:
        """Yield the image files. links: gets the links to folders that are not followed."""
        guard = PathGuard(self.images, self.follow_links)
        for path in files_below(self.images, IMAGE_SUFFIXES, self.follow_links, links):
            if guard.allows(path):
                yield path

    def text(self, path: Path) -> str:
        """Read an annotation file. DataError if it is no text."""
        try:
            return decode_text(path.read_bytes(), self.encoding)
        except TextDecodeError as error:
            raise DataError(f"{path}: {error}; save it as UTF-8, or name its encoding with "
                            "--encoding") from None

    def json(self, path: Path) -> Any:
        """Read a JSON file. DataError that says where it is broken."""
        text = self.text(path)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON "
                            f"({error.msg}); download or unpack it again") from None
        except (ValueError, RecursionError):  # numbers of thousands of digits, endless brackets
            raise DataError(f"{path}: not JSON that can be read") from None


def files_below(root: Path, endings: tuple[str, ...], follow_links: bool = False,
                links: list[Path] | None = None) -> Iterator[Path]:
    """Yield the files below a folder whose names have one of the endings, in lower case."""
    for folder, names in walk_folders(root, follow_links, [] if links is None else links):
        for name in names:
            if name.lower().endswith(endings):
                yield folder / name


def dicts(value: object) -> list[dict[str, Any]]:
    """Return the records of a list; nothing else is one."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def read_coco(folder: AnnotatedFolder) -> Iterator[Item]:
    """Yield the images of COCO's captions_*.json, or of Karpathy's dataset_*.json."""
    years = {year for path in folder.files for year in re.findall(r"20\d\d", path.stem)}
    if len(years) > 1:  # most of val2014 is in train2017
        raise UserError(f"{folder.root}: annotations of {' and '.join(sorted(years))}, whose "
                        "splits share images; name the files of one year with --annotations")
    for path in folder.files:
        document = folder.json(path)
        images = dicts(document.get("images")) if isinstance(document, dict) else []
        if any("sentences" in image for image in images):
            yield from _karpathy_items(images)
        else:
            yield from _coco_items(path, document, images, folder.problems)


def _karpathy_items(images: list[dict[str, Any]]) -> Iterator[Item]:
    for image in images:
        split = str(image.get("split", "train")).lower()
        if split == "restval":  # the rest of COCO's validation images, trained on by convention
            split = "train"
        captions = [sentence.get("raw") for sentence in dicts(image.get("sentences"))]
        name = f"{image.get('filepath', '')}/{image.get('filename', '')}".lstrip("/")
        number = image.get("cocoid", image.get("imgid"))
        yield Item(name, captions, SPLIT_WORDS.get(split, split), {"image_id": number})


def _coco_items(path: Path, document: Any, images: list[dict[str, Any]],
                problems: Counter) -> Iterator[Item]:
    notes = dicts(document.get("annotations")) if isinstance(document, dict) else []
    if not any("caption" in note for note in notes):
        raise DataError(f"{path}: holds no captions of images; give a file such as "
                        "captions_train2017.json or dataset_coco.json with --annotations")
    captions: dict[str, list[object]] = {str(image.get("id")): [] for image in images}
    for note in notes:
        of_image = captions.get(str(note.get("image_id")))
        if of_image is None:
            problems["caption of an unknown image"] += 1
        else:
            of_image.append(note.get("caption"))

    licences = {entry.get("id"): entry.get("name") for entry in dicts(document.get("licenses"))}
    split = file_split(path.stem) or "train"
    for image in images:
        columns = {"image_id": image.get("id"), "license": licences.get(image.get("license"))}
        yield Item(str(image.get("file_name", "")), captions[str(image.get("id"))], split, columns)
