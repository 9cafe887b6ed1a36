"""Webdataset tar shards, read in place: an image is (shard, offset, size), read when asked for.

Nothing is extracted, unpickled or copied into a cache (but for compressed shards, which are
unpacked there), and only images and captions are looked at: `.pkl`, `.pyd`, `.pth` and the like are
passed over. Links, devices and sparse members are ignored.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tokenloom_common.errors import UserError
from tokenloom_common.text_files import TextDecodeError, decode_text
from training.data.sources.captions import caption_lines
from training.data.sources.collector import MAX_TEXT_BYTES, Collector, pop_captions
from training.data.sources.drops import BadItemError
from training.data.sources.left_out import DOWNLOADS_FAILED, download_failed
from training.data.sources.options import ReadOptions
from training.data.sources.splits import SplitFolders
from training.data.sources.tars.archives import BrokenArchiveError, plain_tar
from training.data.sources.tree import IMAGE_SUFFIXES

MAX_MEMBER_BYTES = 64 << 20  # of an image, which is read into memory whole
IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXT_EXTENSIONS = ("txt", "caption")
CLASS_EXTENSIONS = ("cls", "label", "class")
BLOCK = 512  # bytes of a tar header

# of one sample, by extension: offset and size (a shard may hold a million of them)
Members = dict[str, tuple[int, int]]


def read_tars(shards: Sequence[Path], root: Path, options: ReadOptions) -> Collector:
    """Read the items of all shards in order. A damaged shard loses the items behind the damage.

    UserError if the folders in the shards are different splits.
    """
    found = Collector()
    for shard in shards:
        name = shard.relative_to(root).as_posix() if shard.is_relative_to(root) else str(shard)
        try:
            path = plain_tar(shard)
            with path.open("rb") as file:
                reader = SampleReader(file, path, name, found, options)
                members = _members_by_key(file, name, found)
                for key, sample in _samples(members, reader.image_extensions,
                                            reader.text_extensions):
                    reader.add(key, sample)
        except BrokenArchiveError:
            found.drop(name, "broken archive")
        except (tarfile.TarError, OSError) as error:
            cut = "unexpected end" in str(error)
            found.drop(name, "truncated tar" if cut else "broken tar")
    refuse_mixed_splits(found.folders, root)
    return found


def refuse_mixed_splits(folders: dict[str, str], root: Path) -> None:
    """Raise UserError if the members of shards that are read together are different splits.

    folders: those of the members, and where each of them is.
    """
    splits = SplitFolders(map(PurePosixPath, folders))
    examples: dict[str, str] = {}
    for folder, place in folders.items():
        examples.setdefault(splits.split(PurePosixPath(folder)) or "train", place)
    if len(examples) > 1:
        first, second = list(examples.values())[:2]
        raise UserError(f"{root}: tar shards that are read together hold different splits, {first} "
                        f"and {second}: pack each split into shards of its own, such as train.tar "
                        "and validation.tar")


def _members_by_key(file: Any, name: str, found: Collector) -> dict[str, Members]:
    """Return the members whose paths are the same up to the extension, in order of appearance."""
    size = file.seek(0, 2)
    file.seek(0)
    samples: dict[str, Members] = {}
    # "r:" refuses compressed archives, in which a member has no offset to read it at
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := _next_whole(tar, size)) is not None:
            vars(tar)["members"] = []  # tarfile keeps every header otherwise
            if not member.isreg() or member.issparse():
                continue
            path = posixpath.normpath(member.name).lstrip("/")  # `tar c .` puts ./ in front
            folder, _, base = path.rpartition("/")
            # at the first dot, as webdataset does: a.seg.png is "seg.png" of sample a
            stem, _, extension = base.partition(".")
            # without a stem: hidden, such as the ._0.jpg that macOS adds
            if not stem or not extension or "__MACOSX" in folder.split("/"):
                continue

            # .JPG is .jpg, but what stands before it may be a part of the name
            middle, dot, last = extension.rpartition(".")
            extension = f"{middle}{dot}{last.lower()}"
            sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension in sample:
                found.drop(f"{name}:{path}", "name that comes twice")
            else:
                sample[extension] = (member.offset_data, member.size)

        # tarfile stops at a damaged header without an error; a whole archive ends with a zero block
        file.seek(tar.offset)
        end = file.read(BLOCK)
    if end.strip(b"\0"):
        found.drop(name, "broken tar")
    elif len(end) < BLOCK:
        found.drop(name, "truncated tar")
    return samples


def _next_whole(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except tarfile.TarError:
        return None  # the caller sees that the archive does not end here
    # tarfile gives out a member whose content the end of the file cuts off
    if member is None or member.offset_data + member.size > size:
        return None
    return member


def _samples(members: dict[str, Members], images: Sequence[str], texts: Sequence[str],
             ) -> Iterator[tuple[str, Members]]:
    """Yield the samples, also those whose names hold dots: 10.1.jpg with 10.1.txt is sample 10.1.

    The last dot counts where the first gives no image, and wherever it gives one with a text.
    """
    for key, sample in members.items():
        parts: dict[str, Members] = {}  # at the last dot
        for extension, member in sample.items():
            middle, _, last = extension.rpartition(".")
            parts.setdefault(f"{key}.{middle}" if middle else key, {})[last] = member

        has_image = not sample.keys().isdisjoint(images)
        wanted = texts if has_image else (*texts, "json", *CLASS_EXTENSIONS)
        whole = [name for name, part in parts.items() if name != key
                 and not part.keys().isdisjoint(images) and not part.keys().isdisjoint(wanted)]
        if not whole:
            yield key, sample
        elif not has_image:
            yield from parts.items()
        else:
            # a.seg.png, which has no text of its own, stays a part of a
            own = {member for name in whole for member in parts[name].values()}
            yield key, {extension: member for extension, member in sample.items()
                        if member not in own}
            yield from ((name, parts[name]) for name in whole)


def _extension(chosen: str) -> str:
    return chosen.strip().lstrip(".").lower()


class SampleReader:
    """Turns the samples of one shard into items."""

    def __init__(self, file: Any, path: Path, name: str, found: Collector, options: ReadOptions
                 ) -> None:
        """path: of the tar that is read; name: of the shard, for people."""
        self.file, self.path, self.name = file, path, name
        self.found, self.options = found, options
        self.image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
        if options.image_column:
            self.image_extensions = (_extension(options.image_column),)
        self.text_extensions: tuple[str, ...] = TEXT_EXTENSIONS
        if options.caption_column:
            self.text_extensions = (_extension(options.caption_column),)
        elif options.caption_ending:
            self.text_extensions = (_extension(options.caption_ending),)

    def add(self, key: str, sample: Members) -> None:
        """Add a sample to what was found, or count it as unusable or as a failed download."""
        name = f"{self.name}:{key}"
        texts = [sample[extension] for extension in self.text_extensions if extension in sample]
        if any(size > MAX_TEXT_BYTES for _, size in texts):
            self.found.drop(name, "caption file too large")
            return
        image = next((sample[one] for one in self.image_extensions if one in sample), None)
        try:
            captions, metadata = self._captions(sample)
        except TextDecodeError as error:
            self.found.drop_undecoded(name, name, error)
            return
        if image is None and download_failed(metadata):
            self.found.left_out[DOWNLOADS_FAILED] += 1
            return
        if image is None:
            self.found.drop(name, "no picture")
            return
        offset, size = image
        if size > MAX_MEMBER_BYTES:
            self.found.drop(name, "member too large")
            return

        folder = key.rpartition("/")[0]
        self.found.folders.setdefault(folder, f"{self.name}:{folder}/" if folder else name)
        self.found.add(name, captions, metadata, shard=str(self.path), offset=offset, size=size)

    def _captions(self, sample: Members) -> tuple[object, dict[str, Any]]:
        """Return the captions of a sample and its metadata. TextDecodeError if they are no text."""
        captions: object = self._lines(sample, self.text_extensions)
        metadata: dict[str, Any] = {}
        if "json" in sample:
            metadata = self._metadata(sample["json"], required=not captions)
        captions = captions or pop_captions(metadata, self.options)
        if not captions and self.options.caption_column is None:
            captions = self._lines(sample, CLASS_EXTENSIONS)
        return captions, metadata

    def _lines(self, sample: Members, extensions: Sequence[str]) -> list[str]:
        """Return the lines of the first of these members that has any."""
        for extension in extensions:
            if extension in sample:
                text = decode_text(self._read(sample[extension]), self.options.encoding)
                lines = caption_lines(text)
                if lines:
                    return lines
        return []

    def _metadata(self, member: tuple[int, int], required: bool) -> dict[str, Any]:
        try:
            text = decode_text(self._read(member), self.options.encoding)
        except TextDecodeError:
            if required:
                raise
            text = ""  # counted as broken
        return self.found.parse_record(text)

    def _read(self, member: tuple[int, int]) -> bytes:
        offset, size = member
        self.file.seek(offset)
        return self.file.read(min(size, MAX_TEXT_BYTES))


def read_member(shard: str, offset: int, size: int, key: str) -> bytes:
    """Read the bytes of one image. BadItemError if the shard has changed since it was opened."""
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError:
        raise BadItemError(key, "missing shard", f"{shard} cannot be read any more") from None
    if len(content) < size:
        raise BadItemError(key, "truncated tar", f"{shard} is shorter than when it was opened")
    return content
