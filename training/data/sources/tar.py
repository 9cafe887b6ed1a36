"""Webdataset tar shards, indexed once and read in place: a picture is (shard, offset, size), read when it is asked for.

Nothing is extracted or copied into a cache, nothing is unpickled, and only pictures and captions are ever looked at:
`.pkl`, `.pyd`, `.pth` and the like are passed over. Links, devices and sparse members are ignored.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.sources.drops import BadItemError
from training.data.sources.folder import MAX_TEXT_BYTES, Collector, pop_captions

MAX_MEMBER_BYTES = 64 << 20
PICTURES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512

Members = dict[str, tarfile.TarInfo]


def read_tars(shards: list[Path], root: Path, caption_column: str | None, image_column: str | None) -> Collector:
    """Items of all shards in order. A damaged shard costs what follows the damage, and is counted."""
    found = Collector()
    wanted = (image_column,) if image_column else PICTURES
    for shard in shards:
        name = shard.relative_to(root).as_posix() if shard.is_relative_to(root) else str(shard)
        try:
            with shard.open("rb") as file:
                for key, members in _samples(file, name, found):
                    _add_sample(found, file, shard, f"{name}:{key}", members, wanted, caption_column)
        except (tarfile.TarError, OSError) as error:
            cut = "unexpected end" in str(error)
            found.drop(name, "truncated tar" if cut else "broken tar")
    return found


def _samples(file: Any, name: str, found: Collector) -> Iterator[tuple[str, Members]]:
    size = file.seek(0, 2)
    file.seek(0)
    key, members = None, Members()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := _next_whole(tar, size)) is not None:
            vars(tar)["members"] = []  # tarfile keeps every header otherwise
            if not member.isreg() or member.issparse():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not stem or not extension:
                continue
            this = f"{folder}/{stem}" if folder else stem
            if this != key:
                if key is not None:
                    yield key, members
                key, members = this, {}
            members.setdefault(extension.lower(), member)
        if key is not None:
            yield key, members
        file.seek(tar.offset)
        end = file.read(_BLOCK)
    if end.strip(b"\0"):  # tarfile stops without a word at a damaged header
        found.drop(name, "broken tar")
    elif len(end) < _BLOCK:
        found.drop(name, "truncated tar")


def _next_whole(tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
    except tarfile.TarError:
        return None  # the caller sees that the archive goes on behind this point
    if member is None or member.offset_data + member.size > size:
        return None
    return member


def _add_sample(found: Collector, file: Any, shard: Path, key: str, members: Members, wanted: tuple[str, ...],
                caption_column: str | None) -> None:
    picture = next((members[extension] for extension in wanted if extension in members), None)
    if picture is None:
        found.drop(key, "no picture")
        return
    if picture.size > MAX_MEMBER_BYTES:
        found.drop(key, "member too large")
        return
    metadata: dict[str, Any] = {}
    if "json" in members:
        try:
            values = json.loads(_read_text(file, members["json"]))
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            metadata = values
        else:
            found.repairs["broken json beside a picture"] += 1
    captions = None
    if "txt" in members and (caption_column is None or caption_column == "txt"):
        captions = [line for line in _read_text(file, members["txt"]).splitlines() if line.strip()]
    found.add(key, captions or pop_captions(metadata, caption_column), metadata, shard=str(shard),
              offset=picture.offset_data, size=picture.size)


def _read_text(file: Any, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)  # tarfile seeks to its own place before it reads the next header
    return file.read(min(member.size, MAX_TEXT_BYTES))


def read_member(shard: str, offset: int, size: int, key: str) -> bytes:
    """The bytes of one picture. BadItemError if the shard is no longer what was indexed."""
    try:
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError:
        raise BadItemError(key, "missing shard", f"{shard} cannot be read any more") from None
    if len(content) < size:
        raise BadItemError(key, "truncated tar", f"{shard} is shorter than when it was opened")
    return content
