"""Flax's weight files (.msgpack): maps of names, with arrays as MessagePack extension 1. Read without JAX, Flax or msgpack.

The file is walked by hand, because a general reader would copy every array: here each one is a view of the mapped file. The
format: https://github.com/msgpack/msgpack/blob/master/spec.md and flax.serialization. No code runs, and a file that lies about
its lengths, nests without end or holds anything but arrays and numbers is refused.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenloom_common.errors import MissingFileError, UserError, one_line

MAX_DEPTH = 32
MAX_ENTRIES = 1 << 18  # names in all maps together
MAX_NAME_BYTES = 1024
MAX_AXES = 16
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extension types
CHUNKED = "__msgpack_chunked_array__"  # Flax splits arrays of more than 2^30 bytes

DTYPES = {name: getattr(torch, name) for name in (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "complex64", "complex128")}
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
            0xD3: ">q"}
_SIZED = {0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"), 0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"),
          0xC9: ("ext", ">I"), 0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"), 0xDC: ("list", ">H"),
          0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}
_FIXED = {0xC0: None, 0xC2: False, 0xC3: True}


class _Head(NamedTuple):
    """What comes next: its kind, and its value, or how many bytes or entries follow."""

    kind: str
    value: Any
    extension: int = 0


class _Damaged(ValueError):
    """What is wrong, without the file's name."""


def read_msgpack(path: Path) -> dict[str, Tensor]:
    """Every array of the file by its names joined with dots. Tensors are views of the mapped file (private: writing to one
    does not change the file), except arrays that Flax had split. UserError in one line for any damage.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    walk = _Walk(content, len(content))
    try:
        walk.top()
    except _Damaged as error:
        raise UserError(f"{path}: not a whole file of Flax weights ({error}, byte {walk.at:,}); download it again") from None
    if not walk.tensors:
        raise UserError(f"{path}: holds no arrays")
    return walk.tensors


@dataclass
class _Walk:
    """A place in the file, and what was found before it."""

    content: mmap.mmap
    end: int
    at: int = 0

    def __post_init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.entries = 0

    def top(self) -> None:
        head = self.head()
        if head.kind != "map":
            raise _Damaged(f"begins with {head.kind} instead of a map of names")
        self.map(head.value, ())
        if self.at != self.end:
            raise _Damaged(f"{self.end - self.at:,} bytes are left over")

    def take(self, count: int) -> int:
        """Step over `count` bytes -> where they begin."""
        start = self.at
        if count > self.end - start:
            raise _Damaged(f"{count:,} bytes expected, {self.end - start:,} are left")
        self.at += count
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.content, self.take(struct.calcsize(form)))[0]

    def head(self) -> _Head:
        code = self.content[self.take(1)]
        if code < 0x80 or code >= 0xE0:
            return _Head("number", code if code < 0x80 else code - 0x100)
        if code < 0xC0:
            kind, first = ("map", 0x80) if code < 0x90 else ("list", 0x90) if code < 0xA0 else ("text", 0xA0)
            return _Head(kind, code - first)
        if code in _FIXED:
            return _Head("nothing" if code == 0xC0 else "truth", _FIXED[code])
        if code in _NUMBERS:
            return _Head("number", self.number(_NUMBERS[code]))
        if code in _SIZED:
            kind, form = _SIZED[code]
            count = self.number(form)
            return _Head(kind, count, self.number(">b") if kind == "ext" else 0)
        if 0xD4 <= code <= 0xD8:
            return _Head("ext", 1 << (code - 0xD4), self.number(">b"))
        raise _Damaged(f"{code:#x} begins nothing")

    def name(self) -> str:
        head = self.head()
        if head.kind != "text" or not 0 < head.value <= MAX_NAME_BYTES:
            raise _Damaged(f"a name is {head.kind} of size {head.value}")
        start = self.take(head.value)
        try:
            return self.content[start: self.at].decode()
        except UnicodeDecodeError:
            raise _Damaged("a name is not UTF-8 text") from None

    def names(self, count: int) -> Any:
        """The names of a map, each once; its value is read between one and the next."""
        self.entries += count
        if self.entries > MAX_ENTRIES or count * 2 > self.end - self.at:  # a name and a value have at least a byte each
            raise _Damaged(f"a map claims {count:,} entries")
        seen: set[str] = set()
        for _ in range(count):
            name = self.name()
            if name in seen:
                raise _Damaged(f"the name {name[:80]!r} stands twice in a map")
            seen.add(name)
            yield name

    def map(self, count: int, names: tuple[str, ...]) -> None:
        """A map's arrays, and those of the maps in it."""
        if len(names) >= MAX_DEPTH:
            raise _Damaged(f"maps within maps, more than {MAX_DEPTH} deep")
        for number, name in enumerate(self.names(count)):
            if number == 0 and name == CHUNKED:
                self.keep(names, self.chunked(count))
                return
            self.value((*names, name))

    def value(self, names: tuple[str, ...]) -> None:
        head = self.head()
        if head.kind == "map":
            self.map(head.value, names)
        elif head.kind == "ext":
            self.keep(names, self.array(head))
        elif head.kind in ("number", "truth"):
            if isinstance(head.value, int) and head.value >= 2**63:
                raise _Damaged(f"{'.'.join(names)[:80]!r} is {head.value}, too large a number")
            self.keep(names, torch.tensor(head.value))
        else:
            raise _Damaged(f"{'.'.join(names)[:80]!r} is {head.kind} where an array or a map was expected")

    def keep(self, names: tuple[str, ...], tensor: Tensor) -> None:
        name = ".".join(names)
        if name in self.tensors:
            raise _Damaged(f"the name {name[:80]!r} stands twice")
        self.tensors[name] = tensor

    def array(self, outer: _Head) -> Tensor:
        """Extension 1 and 3, (shape, name of the type, bytes), or 2, (real, imaginary part)."""
        start = self.at
        if outer.value > self.end - start:
            raise _Damaged(f"an array claims {outer.value:,} bytes, {self.end - start:,} are left")
        if outer.extension not in (ARRAY, COMPLEX, SCALAR):
            raise _Damaged(f"extension {outer.extension} is none of Flax's")
        head = self.head()
        if (head.kind, head.value) != ("list", 2 if outer.extension == COMPLEX else 3):
            raise _Damaged("an array is not (shape, type, bytes)")
        if outer.extension == COMPLEX:
            parts = self.head(), self.head()
            if any(part.kind != "number" for part in parts):
                raise _Damaged("a complex number has parts that are none")
            found = torch.tensor(complex(*(float(part.value) for part in parts)))
        else:
            found = self.view(self.shape(), self.type())
        if self.at - start != outer.value:
            raise _Damaged(f"an array of {outer.value:,} bytes takes {self.at - start:,}")
        return found

    def shape(self) -> tuple[int, ...]:
        head = self.head()
        if head.kind != "list" or head.value > MAX_AXES:
            raise _Damaged("the shape of an array is no list of at most 16 sizes")
        return tuple(self.size() for _ in range(head.value))

    def size(self) -> int:
        head = self.head()
        if head.kind != "number" or not isinstance(head.value, int) or not 0 <= head.value < 2**48:
            raise _Damaged(f"an array has a side of {head.value!r}")
        return head.value

    def type(self) -> torch.dtype:
        head = self.head()
        if head.kind not in ("text", "bytes") or head.value > 32:
            raise _Damaged(f"the type of an array is {head.kind}")
        start = self.take(head.value)
        name = self.content[start: self.at].decode("ascii", "replace")
        if name not in DTYPES:
            raise _Damaged(f"an array of type {name!r}; known are {', '.join(DTYPES)}")
        return DTYPES[name]

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes that come next as a tensor, not copied."""
        head = self.head()
        count = math.prod(shape)
        if math.prod(max(1, side) for side in shape) >= 2**62:
            raise _Damaged(f"an array claims the shape {list(shape)}")
        if head.kind not in ("bytes", "text") or head.value != count * dtype.itemsize:
            raise _Damaged(f"an array of shape {list(shape)} and type {dtype} has {head.value} bytes")
        start = self.take(head.value)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.content, dtype=dtype, count=count, offset=start).reshape(shape)

    def chunked(self, count: int) -> Tensor:
        """An array that Flax had split: after its mark a map of sizes, and one of flat parts, both with the names 0, 1, ..."""
        mark, names = self.head(), ["shape", "chunks"]
        if (mark.kind, mark.value, count) != ("truth", True, 3):
            raise _Damaged("a split array is not marked as Flax does")
        shape: list[int] = []
        parts: list[Tensor] = []
        for wanted in names:
            if self.name() != wanted:
                raise _Damaged(f"a split array lacks its {wanted}")
            head = self.head()
            if head.kind != "map" or (wanted == "shape" and head.value > MAX_AXES):
                raise _Damaged(f"the {wanted} of a split array is no map")
            for number, name in enumerate(self.names(head.value)):
                if name != str(number):
                    raise _Damaged(f"the {wanted} of a split array are not numbered")
                if wanted == "shape":
                    shape.append(self.size())
                else:
                    parts.append(self.part())
        if not parts or len({part.dtype for part in parts}) > 1 or sum(len(part) for part in parts) != math.prod(shape):
            raise _Damaged(f"the parts of a split array do not make up its shape {shape}")
        return torch.cat(parts).reshape(shape)

    def part(self) -> Tensor:
        head = self.head()
        found = self.array(head) if head.kind == "ext" else None
        if found is None or found.ndim != 1:
            raise _Damaged("a part of a split array is no flat array")
        return found
