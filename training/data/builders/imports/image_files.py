"""Find the image files that annotations name."""

from __future__ import annotations

import filecmp
from pathlib import Path, PurePosixPath

from tokenloom_common.errors import DataError
from training.data.builders.imports.annotations import AnnotatedFolder
from training.data.sources.splits import folder_split


class ImageFiles:
    """Image files below a folder, found by the names that annotations have for them."""

    def __init__(self, folder: AnnotatedFolder) -> None:
        self.root = folder.images
        self.links: list[Path] = []  # to folders elsewhere, which are not followed
        self._by_name: dict[str, list[PurePosixPath]] = {}
        for path in folder.image_files(self.links):
            relative = PurePosixPath(path.relative_to(self.root).as_posix())
            self._by_name.setdefault(path.name, []).append(relative)
        self.split_of: dict[PurePosixPath, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(self, name: str, split: str) -> Path | None:
        """Return the file of an image; None if there is none.

        DataError if several could be meant, or if another split has it, too.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        found = self._by_name.get(wanted.name, [])
        same_folder = [path for path in found if path.parts[-len(wanted.parts):] == wanted.parts]
        if len(wanted.parts) > 1 and same_folder:
            found = same_folder
        else:  # train2017/0.jpg is not the 0.jpg of the validation split
            found = [path for path in found if _folder_split(path) in (None, split)]
            found = [path for path in found if _folder_split(path) == split] or found
        if not found:
            return None

        first = found[0]
        for other in found[1:]:
            # unpacked twice, as Kaggle's Flickr30k is, does no harm
            if not filecmp.cmp(self.root / first, self.root / other, shallow=False):
                raise DataError(f"{self.root}: {first} and {other} differ, and annotations name "
                                f"{name}; name the folder of the images with --images")
        for path in found:
            self.split_of.setdefault(path, split)
        if self.split_of[first] != split:
            raise DataError(f"{self.root}: {first} is in the splits {self.split_of[first]} and "
                            f"{split}; name the annotation files of one choice of splits with "
                            "--annotations")
        return self.root / first


def _folder_split(path: PurePosixPath) -> str | None:
    return next((split for part in path.parts[:-1] if (split := folder_split(part))), None)
