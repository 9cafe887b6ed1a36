"""Tell what a file is that should have been weights: a web page, a pointer of Git LFS, a part."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from tokenloom_common.errors import UserError

_HEAD_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# torch's number at the start of files that it wrote before 1.6, as pickle stores it
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
DOWNLOAD = "download the file itself"


class _Contents(NamedTuple):
    what: str
    remedy: str | None = None


_BY_START = {
    b"version https://git-lfs": _Contents(
        "a pointer of Git LFS", f"run `git lfs pull` in its folder, or {DOWNLOAD}"),
    b"/annex/objects/": _Contents(
        "a pointer of git-annex", f"run `git annex get` on it, or {DOWNLOAD}"),
    b"<": _Contents("a web page", f"{DOWNLOAD}, not a page about it"),
    b"{": _Contents("JSON text, as a server answers", DOWNLOAD),
    b"\x1f\x8b": _Contents("a gzip archive", "unpack it and give the checkpoint inside"),
    b"\x28\xb5\x2f\xfd": _Contents("a zstd archive", "unpack it and give the checkpoint inside"),
    b"7z\xbc\xaf": _Contents("a 7z archive", "unpack it and give the checkpoint inside"),
    b"Rar!": _Contents("a RAR archive", "unpack it and give the checkpoint inside"),
    b"GGUF": _Contents("a GGUF file", "give the weights that it was made from"),
    b"\x89HDF": _Contents("an HDF5 file", "give its weights as .safetensors or .pt"),
    b"\x93NUMPY": _Contents("a NumPy array", "give the weights as .safetensors or .pt"),
}
"""First bytes of a file -> what it is, and what to do."""


_CUT = _Contents("a cut or damaged one")


def not_whole(path: Path, what: str, again: str = "download it again") -> UserError:
    """The error for a file that cannot be read as `what`; it says what the file is, if known.

    again: what to do about a damaged or unknown file.
    """
    try:
        contents = _contents(path)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        return UserError(f"{path}: cannot be read ({reason})")
    if contents is None:
        return UserError(f"{path}: not a whole {what}; {again}")
    return UserError(f"{path}: not a whole {what} but {contents.what}; {contents.remedy or again}")


def _contents(path: Path) -> _Contents | None:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return _Contents("an empty file")
    if len(head) == _HEAD_BYTES and not any(head):
        return _Contents("zeros at its start, as an interrupted download leaves them")

    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, contents in _BY_START.items():
        if text.startswith(start):
            return contents
    if head[257:262] == b"ustar":
        return _Contents("a tar archive", "unpack it and give the checkpoint inside")
    return _other_weights(path, head)


def _other_weights(path: Path, head: bytes) -> _Contents | None:
    """Weights of another format than the file's ending says, or the beginning of some."""
    is_safetensors = path.suffix == ".safetensors"
    if head.startswith(b"PK"):
        if is_safetensors:
            return _Contents("a zip archive, as torch.save writes", "rename it to end in .pt")
        return _CUT
    if head.startswith(b"\x80"):  # a pickle
        if is_safetensors:
            return _Contents("a pickle, as torch.save writes", "rename it to end in .pt")
        if _TORCH_MAGIC not in head[:20]:
            return _Contents("a pickle that torch.save did not write",
                             "load it where it was made and save its tensors with torch.save")
        return None

    # safetensors: the length of its header, then the header as JSON
    length = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    if head[8:9] != b"{" or not 0 < length <= _MAX_HEADER_BYTES:
        return None
    if is_safetensors:
        return _CUT
    return _Contents("a safetensors file", "rename it to end in .safetensors")
