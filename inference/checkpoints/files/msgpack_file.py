"""Read Flax's weight files (.msgpack) without JAX, Flax or msgpack.

A file is nested maps of names, with arrays as MessagePack extension 1. It is walked by hand because
a general reader would copy every array: here each one is a view of the mapped file. Formats:
https://github.com/msgpack/msgpack/blob/master/spec.md and flax.serialization. No code runs, and a
file that lies about lengths, nests without end or holds anything but arrays and numbers is refused.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenloom_common.errors import MissingFileError, UserError, one_line

# far above any model, and low enough that a hostile file costs neither memory nor the stack
MAX_DEPTH = 32
MAX_ENTRIES = 1 << 18  # names in all maps together
MAX_NAME_BYTES = 1024
MAX_AXES = 16
MAX_SIDE = 1 << 48
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extension types
CHUNKED = "__msgpack_chunked_array__"  # Flax splits arrays of more than 2^30 bytes

DTYPES = {name: getattr(torch, name) for name in (
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "complex64", "complex128")}

# MessagePack's first byte of a value -> what follows it, all big-endian
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
            0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SIZED = {0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
          0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
          0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
          0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}
_CONSTANTS = {0xC0: ("nothing", None), 0xC2: ("truth", False), 0xC3: ("truth", True)}


class _Head(NamedTuple):
    """The head of a value: its kind, and the value itself or how many bytes or entries follow."""

    kind: str
    value: Any
    extension: int = 0


class _DamagedError(ValueError):
    """The damage, without the file's name."""


def read_msgpack(path: Path) -> dict[str, Tensor]:
    """Every array of the file by its names joined with dots. UserError in one line for any damage.

    Tensors are views of the mapped file (private: writing to one does not change the file), except
    arrays that Flax had split.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # else torch warns
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None

    reader = _Reader(content, len(content))
    try:
        reader.read_file()
    except _DamagedError as error:
        raise UserError(f"{path}: not a whole file of Flax weights ({error}, byte {reader.at:,}); "
                        "download it again") from None
    if not reader.tensors:
        raise UserError(f"{path}: holds no arrays")
    return reader.tensors


@dataclass
class _Reader:
    """A position in the file, and the tensors found before it."""

    content: mmap.mmap
    end: int
    at: int = 0
    entries: int = 0  # in all maps so far
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def read_file(self) -> None:
        head = self.head()
        if head.kind != "map":
            raise _DamagedError(f"begins with {head.kind} instead of a map of names")
        self.read_map(head.value, ())
        if self.at != self.end:  # two files in one, or a length that is too small
            raise _DamagedError(f"{self.end - self.at:,} bytes are left over")

    # ---- MessagePack ----

    def skip(self, count: int) -> int:
        """Step over `count` bytes -> where they begin."""
        start = self.at
        if count > self.end - start:
            raise _DamagedError(f"{count:,} bytes expected, {self.end - start:,} are left")
        self.at += count
        return start

    def number(self, form: str) -> Any:
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.content, start)[0]

    def head(self) -> _Head:
        code = self.content[self.skip(1)]
        if code < 0x80:  # positive fixint
            return _Head("number", code)
        if code < 0x90:  # fixmap
            return _Head("map", code - 0x80)
        if code < 0xA0:  # fixarray
            return _Head("list", code - 0x90)
        if code < 0xC0:  # fixstr
            return _Head("text", code - 0xA0)
        if code >= 0xE0:  # negative fixint
            return _Head("number", code - 0x100)
        if code in _CONSTANTS:
            return _Head(*_CONSTANTS[code])
        if code in _NUMBERS:
            return _Head("number", self.number(_NUMBERS[code]))
        if code in _SIZED:
            kind, form = _SIZED[code]
            count = self.number(form)
            return _Head(kind, count, self.number(">b") if kind == "ext" else 0)
        if 0xD4 <= code <= 0xD8:  # fixext 1, 2, 4, 8, 16
            return _Head("ext", 1 << (code - 0xD4), self.number(">b"))
        raise _DamagedError(f"{code:#x} begins nothing")

    # ---- maps of names ----

    def name(self) -> str:
        head = self.head()
        if head.kind != "text" or not 0 < head.value <= MAX_NAME_BYTES:
            raise _DamagedError(f"a name is {head.kind} of size {head.value}")
        start = self.skip(head.value)
        try:
            return self.content[start: self.at].decode()
        except UnicodeDecodeError:
            raise _DamagedError("a name is not UTF-8 text") from None

    def names(self, count: int) -> Iterator[str]:
        """The names of a map, each once; the caller reads a name's value before the next name."""
        self.entries += count
        least = 2 * count  # bytes: a name and a value have at least one each
        if self.entries > MAX_ENTRIES or least > self.end - self.at:
            raise _DamagedError(f"a map claims {count:,} entries")
        seen: set[str] = set()
        for _ in range(count):
            name = self.name()
            if name in seen:
                raise _DamagedError(f"the name {name[:80]!r} stands twice in a map")
            seen.add(name)
            yield name

    def read_map(self, count: int, names: tuple[str, ...]) -> None:
        """Keep a map's arrays, and those of the maps inside; `names` lead to it."""
        if len(names) >= MAX_DEPTH:
            raise _DamagedError(f"maps within maps, more than {MAX_DEPTH} deep")
        for number, name in enumerate(self.names(count)):
            if number == 0 and name == CHUNKED:
                self.keep(names, self.chunked(count))
                return
            self.read_value((*names, name))

    def read_value(self, names: tuple[str, ...]) -> None:
        head = self.head()
        if head.kind == "map":
            self.read_map(head.value, names)
        elif head.kind == "ext":
            self.keep(names, self.array(head))
        elif head.kind in ("number", "truth"):
            if isinstance(head.value, int) and head.value >= 2**63:  # torch.tensor makes an int64
                raise _DamagedError(f"{_shown(names)} is {head.value}, too large a number")
            self.keep(names, torch.tensor(head.value))
        else:
            raise _DamagedError(f"{_shown(names)} is {head.kind} where an array "
                                "or a map was expected")

    def keep(self, names: tuple[str, ...], tensor: Tensor) -> None:
        name = ".".join(names)
        if name in self.tensors:  # a name may hold dots itself
            raise _DamagedError(f"the name {name[:80]!r} stands twice")
        self.tensors[name] = tensor

    # ---- Flax's arrays ----

    def array(self, outer: _Head) -> Tensor:
        """Extensions 1 and 3, (shape, dtype name, bytes), or 2, (real, imaginary part)."""
        start = self.at  # the content is a MessagePack list of its own, read in place
        if outer.value > self.end - start:
            raise _DamagedError(f"an array claims {outer.value:,} bytes, {self.end - start:,} are "
                                "left")
        if outer.extension not in (ARRAY, COMPLEX, SCALAR):
            raise _DamagedError(f"extension {outer.extension} is none of Flax's")
        is_complex = outer.extension == COMPLEX
        head = self.head()
        if (head.kind, head.value) != ("list", 2 if is_complex else 3):
            raise _DamagedError("an array is not (shape, type, bytes)")
        found = self.complex_number() if is_complex else self.view(self.shape(), self.dtype())
        if self.at - start != outer.value:
            raise _DamagedError(f"an array of {outer.value:,} bytes takes {self.at - start:,}")
        return found

    def complex_number(self) -> Tensor:
        real, imaginary = self.head(), self.head()
        if real.kind != "number" or imaginary.kind != "number":
            raise _DamagedError("a complex number has parts that are none")
        return torch.tensor(complex(float(real.value), float(imaginary.value)))

    def shape(self) -> tuple[int, ...]:
        head = self.head()
        if head.kind != "list" or head.value > MAX_AXES:
            raise _DamagedError(f"the shape of an array is no list of at most {MAX_AXES} sizes")
        return tuple(self.side() for _ in range(head.value))

    def side(self) -> int:
        head = self.head()
        is_integer = head.kind == "number" and isinstance(head.value, int)
        if not is_integer or not 0 <= head.value < MAX_SIDE:
            raise _DamagedError(f"an array has a side of {head.value!r}")
        return head.value

    def dtype(self) -> torch.dtype:
        head = self.head()
        if head.kind not in ("text", "bytes") or head.value > 32:
            raise _DamagedError(f"the type of an array is {head.kind}")
        start = self.skip(head.value)
        name = self.content[start: self.at].decode("ascii", "replace")
        if name not in DTYPES:
            raise _DamagedError(f"an array of type {name!r}; known are {', '.join(DTYPES)}")
        return DTYPES[name]

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next value's bytes as a tensor, not copied."""
        head = self.head()
        count = math.prod(shape)
        # torch computes strides as if a side of 0 were 1, and overflows beyond this
        if math.prod(max(1, side) for side in shape) >= 2**62:
            raise _DamagedError(f"an array claims the shape {list(shape)}")
        # "text" too, here and in dtype: MessagePack of before 2013 has one type for both
        if head.kind not in ("bytes", "text") or head.value != count * dtype.itemsize:
            raise _DamagedError(f"an array of shape {list(shape)} and type {dtype} has "
                                f"{head.value} bytes")
        start = self.skip(head.value)
        if count == 0:  # torch.frombuffer refuses to make an empty tensor
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.content, dtype=dtype, count=count, offset=start).reshape(shape)

    # ---- arrays that Flax had split ----

    def chunked(self, count: int) -> Tensor:
        """An array split into `chunks` with a `shape`, maps that number their entries from "0"."""
        mark = self.head()  # after the name CHUNKED; `count` entries are in the map
        if (mark.kind, mark.value, count) != ("truth", True, 3):
            raise _DamagedError("a split array is not marked as Flax does")
        shape = [self.side() for _ in self.numbered("shape", MAX_AXES)]
        chunks = [self.flat_array() for _ in self.numbered("chunks", MAX_ENTRIES)]

        dtypes = {chunk.dtype for chunk in chunks}  # torch.cat would promote several silently
        total = sum(len(chunk) for chunk in chunks)
        if len(dtypes) != 1 or total != math.prod(shape):
            raise _DamagedError(f"the parts of a split array do not make up its shape {shape}")
        return torch.cat(chunks).reshape(shape)

    def numbered(self, wanted: str, limit: int) -> Iterator[str]:
        """The entries of the map called `wanted`, which must be numbered."""
        if self.name() != wanted:
            raise _DamagedError(f"a split array lacks its {wanted}")
        head = self.head()
        if head.kind != "map" or head.value > limit:
            raise _DamagedError(f"the {wanted} of a split array is no map")
        for number, name in enumerate(self.names(head.value)):
            if name != str(number):
                raise _DamagedError(f"the {wanted} of a split array are not numbered")
            yield name

    def flat_array(self) -> Tensor:
        head = self.head()
        if head.kind == "ext":
            found = self.array(head)
            if found.ndim == 1:
                return found
        raise _DamagedError("a part of a split array is no flat array")


def _shown(names: tuple[str, ...]) -> str:
    return repr(".".join(names)[:80])  # a hostile name may be long
