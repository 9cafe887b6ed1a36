"""Webdataset tar shards, read in place: an image is (shard, offset, size), read when asked for.

Nothing is extracted, unpickled or copied into a cache, and only images and captions are looked at:
`.pkl`, `.pyd`, `.pth` and the like are passed over. Links, devices and sparse members are ignored.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.sources.collector import MAX_TEXT_BYTES, Collector, pop_captions
from training.data.sources.drops import BadItemError
from training.data.sources.options import ReadOptions

MAX_MEMBER_BYTES = 64 << 20  # of an image, which is read into memory whole
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes of a tar header

Members = dict[str, tarfile.TarInfo]  # of one sample, by extension


def read_tars(shards: list[Path], root: Path, options: ReadOptions) -> Collector:
    """Read the items of all shards in order. A damaged shard loses the items behind the damage."""
    found = Collector()
    extensions = (options.image_column,) if options.image_column else IMAGE_EXTENSIONS
    for shard in shards:
        name = shard.relative_to(root).as_posix() if shard.is_relative_to(root) else str(shard)
        try:
            with shard.open("rb") as file:
                for key, members in _samples(file, name, found):
                    _add_sample(found, file, shard, f"{name}:{key}", members, extensions,
                                options)
        except (tarfile.TarError, OSError) as error:
            cut = "unexpected end" in str(error)
            found.drop(name, "truncated tar" if cut else "broken tar")
    return found


def _samples(file: Any, name: str, found: Collector) -> Iterator[tuple[str, Members]]:
    """Yield consecutive members whose paths are the same up to the extension, as one sample."""
    size = file.seek(0, 2)
    file.seek(0)
    key = None
    members = Members()
    # "r:" refuses compressed archives, in which a member has no offset to read it at
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := _next_whole(tar, size)) is not None:
            vars(tar)["members"] = []  # tarfile keeps every header otherwise
            if not member.isreg() or member.issparse():
                continue
            folder, _, base = member.name.rpartition("/")
            # at the first dot, as webdataset does: a.seg.png is "seg.png" of sample a
            stem, _, extension = base.partition(".")
            if not stem or not extension:
                continue

            member_key = f"{folder}/{stem}" if folder else stem
            if member_key != key:
                if key is not None:
                    yield key, members
                key = member_key
                members = {}
            members.setdefault(extension.lower(), member)
        if key is not None:
            yield key, members

        # tarfile stops at a damaged header without an error; a whole archive ends with a zero block
        file.seek(tar.offset)
        end = file.read(BLOCK)
    if end.strip(b"\0"):
        found.drop(name, "broken tar")
    elif len(end) < BLOCK:
        found.drop(name, "truncated tar")


def _next_whole(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except tarfile.TarError:
        return None  # the caller sees that the archive does not end here
    # tarfile gives out a member whose content the end of the file cuts off
    if member is None or member.offset_data + member.size > size:
        return None
    return member


def _add_sample(found: Collector, file: Any, shard: Path, key: str, members: Members,
                extensions: tuple[str, ...], options: ReadOptions) -> None:
    image = next((members[name] for name in extensions if name in members), None)
    if image is None:
        found.drop(key, "no picture")
        return
    if image.size > MAX_MEMBER_BYTES:
        found.drop(key, "member too large")
        return

    metadata: dict[str, Any] = {}
    if "json" in members:
        try:
            record = json.loads(_read_text(file, members["json"]))
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            metadata = record
        else:
            # the image and a .txt beside it may still be fine
            found.repairs["broken json beside a picture"] += 1

    captions: object = None
    if "txt" in members and options.caption_column in (None, "txt"):
        lines = _read_text(file, members["txt"]).splitlines()
        captions = [line for line in lines if line.strip()]
    found.add(key, captions or pop_captions(metadata, options), metadata, shard=str(shard),
              offset=image.offset_data, size=image.size)


def _read_text(file: Any, member: tarfile.TarInfo) -> bytes:
    # moving the file position is safe: tarfile seeks before it reads the next header
    file.seek(member.offset_data)
    return file.read(min(member.size, MAX_TEXT_BYTES))


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
