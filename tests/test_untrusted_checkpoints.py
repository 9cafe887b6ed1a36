"""Files from strangers: nothing of them runs, and every damaged one is an error in one line within bounded memory."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.checkpoints import ConvertOptions, convert, from_checkpoint
from inference.checkpoints.files.torch_file import HARMLESS
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.formats.llamagen_vq import LAYOUT
from inference.checkpoints.formats.vqgan_names import LANDMARK
from tests.hostile_files import Runs
from tests.vqgan_references import Shape, make_state
from tokenloom_common.errors import MissingFileError, UserError

SMALL = Shape(multipliers=(1,), attention=(), names="llamagen", dim=4, codes=16)
SIDE = 8


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state(SMALL)


# ---- code

@pytest.mark.parametrize(("function", "named"), [
    (os.system, "posix.system"), (eval, "eval"), (exec, "exec"), (subprocess.call, ".call"), (getattr, "getattr"),
    (torch.hub.load, "torch.hub.load"), (open, "open"), (__import__, "__import__"), (torch.load, "torch.serialization.load"),
    (pickle.loads, "pickle.loads")])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_asks_for_code_is_refused_by_name_and_runs_none(tmp_path, state, function, named, zipped):
    mark = tmp_path / "mark"
    arguments = (f"touch {mark}",) if function is not open else (str(mark), "w")
    path = tmp_path / "hostile.pt"
    torch.save({"model": state, "extra": Runs(function, *arguments)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="refused: beside tensors it asks for") as refused:
        from_checkpoint("llamagen-vq", path)
    assert f"{named}, which could run code" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not mark.exists()


def test_a_bare_pickle_runs_nothing_either(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match=r"bare\.ckpt"):
        read_weights(tmp_path / "bare.ckpt", LAYOUT)
    assert not mark.exists()


def test_a_stand_in_is_no_way_to_code(tmp_path, state):
    """A harmless class may be built with anything, and given any state, and does nothing with either."""
    path = tmp_path / "args.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(name="x")),
                "seen": collections.defaultdict(list, {"a": [1]}), "where": Path("/etc/passwd")}, path)
    assert read_weights(path, LAYOUT).tensors.keys() == state.keys()


def test_harmless_classes_are_no_functions():
    """Each ends in a class's name, or is NumPy's way of making one."""
    for name in HARMLESS:
        last = name.rsplit(".", 1)[-1]
        assert last[0].isupper() or name.startswith(("numpy.", "builtins.", "collections.defaultdict")) or (
            last == "fragment_address"), name
        assert last not in ("eval", "exec", "getattr", "open", "system", "import_module")


# ---- paths

@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".hidden.safetensors", ""])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"encoder.conv_in.weight": file}}))
    with pytest.raises(UserError, match="outside its folder"):
        read_weights(index, LAYOUT)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', "\x00", "{}", '{"weight_map": ["a"]}', "[" * 100_000])
def test_a_damaged_index_is_one_line(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match="index") as error:
        read_weights(index, LAYOUT)
    assert "\n" not in str(error.value)


def test_a_shard_that_lacks_a_tensor_or_is_not_there(tmp_path):
    from safetensors.torch import save_file

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(MissingFileError, match=r"one\.safetensors"):
        read_weights(index, LAYOUT)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="lacks 1 tensors that the index places in it \\(b\\)"):
        read_weights(index, LAYOUT)


def test_archives_of_other_kinds_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("../../outside.txt", "x")
    with pytest.raises(UserError, match=r"without torch's data\.pkl"):
        read_weights(tmp_path / "a.pt", LAYOUT)
    assert not (tmp_path.parent.parent / "outside.txt").exists()
    for name, words in (("a.zip", "not a weights file"), ("no.pt", "no such file")):
        (tmp_path / "a.zip").write_bytes(b"PK")
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / name, LAYOUT)


def test_an_archive_that_claims_to_span_disks_is_one_line(tmp_path, state):
    """What zipfile says even when it is asked whether a file is a zip."""
    torch.save({"model": state}, tmp_path / "vq.pt")
    data = (tmp_path / "vq.pt").read_bytes()
    end = data.rindex(b"PK\5\6")
    (tmp_path / "vq.pt").write_bytes(data[:end] + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2) + data[end:])
    with pytest.raises(UserError, match="not a whole torch checkpoint"):
        read_weights(tmp_path / "vq.pt", LAYOUT)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, state):
    """A small file could hold gigabytes of pickle."""
    torch.save({"model": state}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(UserError, match="not as torch writes it"):
        read_weights(tmp_path / "bomb.pt", LAYOUT)


# ---- sizes

def header(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a safetensors header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    values = json.loads(data[8:8 + length])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])


@pytest.mark.parametrize("change", [
    lambda h: h["quant_conv.bias"].update(shape=[1 << 50]), lambda h: h["quant_conv.bias"].update(data_offsets=[0, 1 << 60]),
    lambda h: h["quant_conv.bias"].update(dtype="F8_NO"), lambda h: h["quant_conv.bias"].update(data_offsets=[9, 3]),
    lambda h: h["quant_conv.bias"].update(shape=[-1]), lambda h: h["quant_conv.bias"].update(shape=[0, 1 << 63]),
    lambda h: h.update(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})],
    ids=["huge shape", "huge offsets", "unknown type", "backwards", "negative", "nothing but huge", "overlapping"])
def test_a_header_that_lies_is_one_line(tmp_path, state, change):
    from safetensors.torch import save_file

    save_file(state, tmp_path / "vq.safetensors")
    header(tmp_path / "vq.safetensors", change)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        from_checkpoint("llamagen-vq", tmp_path / "vq.safetensors")


@pytest.mark.parametrize("length", [0, 1 << 62, (1 << 64) - 1, 99_999_999])
def test_a_header_of_another_length_is_one_line(tmp_path, length):
    (tmp_path / "vq.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_weights(tmp_path / "vq.safetensors", LAYOUT)


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path, state):
    """Strides of 0 make a terabyte of four bytes."""
    huge = torch.zeros(1).expand(1 << 20, 1 << 18)
    torch.save({"model": {**state, "quantize.embedding.weight": huge}}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match=r"claims .* more than the file holds"):
        from_checkpoint("llamagen-vq", tmp_path / "vq.pt")


def test_only_dense_tensors_are_read(tmp_path):
    torch.save({LANDMARK: torch.zeros(1), "b": torch.zeros(2, 2).to_sparse()}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="tensor b is"):
        read_weights(tmp_path / "odd.pt", LAYOUT)


# ---- mutations

def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut, overwritten, with bits flipped, lengthened, or with numbers made huge."""
    changed = bytearray(data)
    way = draw.randrange(6)
    if way == 0:
        return bytes(changed[:draw.randrange(len(changed))])
    near_start = draw.random() < 0.7  # headers and pickles are where it hurts
    place = draw.randrange(min(4096, len(changed)) if near_start else len(changed))
    if way == 5:  # torch's directory of records stands at the end
        place = len(changed) - 1 - draw.randrange(min(4096, len(changed)))
    if way in (1, 5):
        for _ in range(draw.randrange(1, 9)):
            changed[(place + draw.randrange(64)) % len(changed)] ^= 1 << draw.randrange(8)
    elif way == 2:
        changed[place:place + 8] = draw.choice([b"\xff" * 8, b"\x00" * 8, b"99999999", (1 << 40).to_bytes(8, "little")])
    elif way == 3:
        cut = draw.randrange(1, 200)
        del changed[place:place + cut]
    else:
        changed[place:place] = draw.randbytes(draw.randrange(1, 200))
    return bytes(changed)


def changed_tensors(state: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """One tensor of another type, another shape, or not there."""
    name = draw.choice(sorted(state))
    other = draw.choice([
        lambda t: t.to(draw.choice([torch.int64, torch.float64, torch.bool, torch.complex64])), lambda t: t.flatten(),
        lambda t: t[None], lambda t: t.new_zeros(0), lambda t: t[:1], lambda t: t.new_zeros(()), lambda t: None,
        lambda t: t.repeat(3, *([1] * (t.ndim - 1)))])(state[name])
    return {key: tensor for key, tensor in {**state, name: other}.items() if tensor is not None}


@pytest.mark.long
def test_mutated_files_are_errors_in_one_line(tmp_path, state, request):
    """`--mutations 10000` for more of them. A flipped bit of a weight is no error, anything else must be a UserError."""
    from safetensors.torch import save_file

    draw = random.Random(0)
    save_file(state, tmp_path / "whole.safetensors")
    torch.save({"model": state, "args": argparse.Namespace(a=1)}, tmp_path / "whole.pt")
    torch.save({"model": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    wholes = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before, outcomes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, collections.Counter()
    for _ in range(request.config.getoption("--mutations")):
        name = draw.choice(sorted(wholes))
        path = tmp_path / f"mutated{Path(name).suffix}"
        if draw.random() < 0.25:
            other = changed_tensors(state, draw)
            save_file(other, path) if path.suffix == ".safetensors" else torch.save({"model": other}, path)
        else:
            path.write_bytes(mutated(wholes[name], draw))
        try:
            convert("llamagen-vq", path, ConvertOptions(resolution=SIDE))
            outcomes["loaded"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
            outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["loaded"] > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB: a file has 200
