"""Flax's weight files without Flax: every array as it is, and nothing but one line for a damaged or hostile file."""

from __future__ import annotations

import random
import struct
import time

import msgpack
import numpy
import pytest
import torch

from inference.checkpoints.files.msgpack_file import read_msgpack
from tests.flax_files import flax_bytes, packed
from tokenloom_common.errors import MissingFileError, UserError

RNG = numpy.random.default_rng(0)
TREE = {"model": {"a": RNG.normal(size=(3, 4)).astype("float32"), "b": {"kernel": RNG.normal(size=(5,)).astype("float16"),
                                                                        "step": numpy.int64(7)}},
        "up_0": {"c": RNG.integers(0, 99, (2, 1, 3)), "d": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3) / 3},
        "none": {}, "empty": numpy.zeros((0, 4), "float32"), "z": 1.5, "count": 3, "i": complex(1, -2),
        "scalar": numpy.array(2.5)}


def _read(tmp_path, content: bytes):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    return read_msgpack(path)


def test_every_array_is_read_by_its_names(tmp_path):
    found = _read(tmp_path, flax_bytes(TREE))
    assert sorted(found) == ["count", "empty", "i", "model.a", "model.b.kernel", "model.b.step", "scalar", "up_0.c", "up_0.d",
                             "z"]
    for name, array in (("model.a", TREE["model"]["a"]), ("model.b.kernel", TREE["model"]["b"]["kernel"]),
                        ("up_0.c", TREE["up_0"]["c"]), ("empty", TREE["empty"]), ("scalar", TREE["scalar"])):
        assert found[name].numpy().dtype == array.dtype
        assert numpy.array_equal(found[name].numpy(), array)
    assert torch.equal(found["up_0.d"], TREE["up_0"]["d"])
    assert (found["model.b.step"].item(), found["z"].item(), found["count"].item(), found["i"].item()) == (7, 1.5, 3, 1 - 2j)


@pytest.mark.parametrize("offset", range(1, 9))
def test_arrays_at_odd_places_are_the_same(tmp_path, offset):
    values = torch.randn(37, 16, generator=torch.Generator().manual_seed(0))
    found = _read(tmp_path, flax_bytes({"x" * offset: values}))["x" * offset]
    assert torch.equal(found, values)
    assert torch.equal(found.t().contiguous(), values.t())
    assert torch.equal(found @ found.t(), values @ values.t())
    assert torch.equal(found.half(), values.half())


def test_split_arrays_are_put_together(tmp_path):
    for chunk_bytes in (1, 8, 20, 47, 48):
        found = _read(tmp_path, flax_bytes({"a": TREE["model"]["a"], "n": TREE["up_0"]["c"]}, chunk_bytes))
        assert numpy.array_equal(found["a"].numpy(), TREE["model"]["a"])
        assert numpy.array_equal(found["n"].numpy(), TREE["up_0"]["c"])


def test_arrays_are_views_and_the_file_stays_as_it_is(tmp_path):
    import resource

    size = 8 << 20
    content = flax_bytes({"large": numpy.ones(size // 4, "float32")})
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    del content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = read_msgpack(path)["large"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < size // 4096 // 4  # its pages were not touched
    tensor[:4] = 5
    assert read_msgpack(path)["large"][:4].tolist() == [1, 1, 1, 1]


def _ext(content: bytes, kind: int = 1) -> bytes:
    return b"\x81\xa1a" + msgpack.packb(msgpack.ExtType(kind, content))


def _array(shape, dtype="float32", content=b"\0" * 8) -> bytes:
    return _ext(packed(shape, dtype, content))


SPLIT = "__msgpack_chunked_array__"


@pytest.mark.parametrize(("content", "words"), [
    (b"", "cannot be read"),
    (b"\x80", "holds no arrays"),
    (b"\x90", "begins with list"),
    (b"\xc1", "begins nothing"),
    (b"not msgpack at all", "begins with number"),
    (_array((2,)) + b"\0", "left over"),
    (_array((3,)), "has 8 bytes"),
    (_array((2**40, 2**40)), "claims the shape"),
    (_array((0, 2**47, 2**47), content=b""), "claims the shape"),
    (_array((-2, -1)), "side of -2"),
    (_array((2.0,)), "side of 2.0"),
    (_array((True,)), "side of True"),
    (_array((1,) * 17), "at most 16"),
    (_array(8), "at most 16"),
    (_array((2,), "object"), "type 'object'"),
    (_array((2,), "float31"), "type 'float31'"),
    (_array((2,), "x" * 99), "type of an array"),
    (_array((2,), 5), "type of an array"),
    (_array((2,), content="\0" * 9), "has 9 bytes"),
    (_array((2,), content=[0] * 8), "an array of shape"),
    (_ext(packed((2,), "float32", b"\0" * 8) + b"\0"), "takes"),
    (_ext(b"\x92\x01\x02"), r"\(shape, type, bytes\)"),
    (_ext(b"\x92\xa1x\x02", 2), "parts that are none"),
    (_ext(b"\x92\x01\x02", 9), "none of Flax's"),
    (b"\x81\xa1a\xa1b", "is text where"),
    (b"\x81\xa1a\x91\x01", "is list where"),
    (b"\x81\xa1a\xc0", "is nothing where"),
    (b"\x81\xa1a\xcf" + b"\xff" * 8, "too large a number"),
    (b"\x82\xa1a\x01\xa1a\x02", "stands twice in a map"),
    (b"\x82\xa1a\x81\xa1b\x01\xa3a.b\x02", "stands twice"),
    (b"\x81\x01\x02", "a name is number"),
    (b"\x81\xa0\x02", "a name is text of size 0"),
    (b"\x81\xa2\xff\xfe\x02", "not UTF-8"),
    (b"\x81\xda\xff\xff" + b"a" * 65535 + b"\x01", "a name is text of size 65535"),
    (b"\x81\xa1a" * 100_000, "more than 32 deep"),
    (b"\xdf\xff\xff\xff\xff", "a map claims 4,294,967,295 entries"),
    (b"\xdf\x00\x08\x00\x00" + b"\xa1a\x01" * (1 << 20), "a map claims 524,288 entries"),
    (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "an array claims 4,294,967,295 bytes"),
    (b"\x81\xa1a\xdd\xff\xff\xff\xff", "is list where"),
    (b"\x81\xa1a\xc6\xff\xff\xff\xff", "is bytes where"),
    (msgpack.packb({"a": {SPLIT: False, "shape": {}, "chunks": {}}}), "not marked as Flax does"),
    (msgpack.packb({"a": {SPLIT: True, "shape": {}}}), "not marked as Flax does"),
    (msgpack.packb({"a": {SPLIT: True, "form": {}, "chunks": {}}}), "lacks its shape"),
    (msgpack.packb({"a": {SPLIT: True, "shape": {"0": 2}, "chunks": {}}}), "do not make up its shape"),
    (msgpack.packb({"a": {SPLIT: True, "shape": {"1": 2}, "chunks": {}}}), "not numbered"),
    (msgpack.packb({"a": {SPLIT: True, "shape": {"0": 2}, "chunks": {"0": {SPLIT: True}}}}), "no flat array"),
    (msgpack.packb({"a": {SPLIT: True, "shape": [2], "chunks": {}}}), "is no map")])
def test_damaged_and_hostile_files_are_one_line(tmp_path, content, words):
    began = time.perf_counter()
    with pytest.raises(UserError, match=words) as caught:
        _read(tmp_path, content)
    assert "flax_model.msgpack" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - began < 1


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = flax_bytes(TREE, chunk_bytes=20)
    for end in range(1, len(content), 3):
        with pytest.raises(UserError):
            _read(tmp_path, content[:end])


def test_mutated_files_are_read_or_refused(tmp_path, request):
    """`--mutations 10000` for more of them."""
    draw, content = random.Random(0), flax_bytes(TREE, chunk_bytes=20)
    path, refused, began = tmp_path / "flax_model.msgpack", 0, time.perf_counter()
    count = request.config.getoption("--mutations")
    for _ in range(count):
        harmed = bytearray(content)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(harmed))
            kind = draw.randrange(4)
            if kind == 0:
                harmed[at] = draw.randrange(256)
            elif kind == 1:
                harmed[at: at + 4] = struct.pack(">I", draw.choice([0, 2**31, 2**32 - 1, draw.randrange(2**32)]))
            elif kind == 2:
                del harmed[at: at + draw.randrange(1, 20)]
            else:
                harmed[at:at] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(harmed)
        try:
            read_msgpack(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > count // 4
    assert time.perf_counter() - began < 0.02 * count + 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        read_msgpack(tmp_path / "flax_model.msgpack")
