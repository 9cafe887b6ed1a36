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

import tokenloom
from inference.checkpoints import ConvertOptions, convert, from_checkpoint
from inference.checkpoints.files.torch_file import HARMLESS
from inference.checkpoints.files.weights_file import read_weights
from tests.vqgan_references import Shape, make_state
from tokenloom_common.errors import MissingFileError, UserError

SMALL = Shape(multipliers=(1,), attention=(), names="llamagen", dim=4, codes=16)
SIDE = 8


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state(SMALL)


# ---- code

class Runs:
    """Pickled, it is a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


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
        read_weights(tmp_path / "bare.ckpt")
    assert not mark.exists()


def test_a_stand_in_is_no_way_to_code(tmp_path, state):
    """A harmless class may be built with anything, and given any state, and does nothing with either."""
    path = tmp_path / "args.pt"
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(name="x")),
                "seen": collections.defaultdict(list, {"a": [1]}), "where": Path("/etc/passwd")}, path)
    payload = read_weights(path)
    assert payload.keys() == state.keys()


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
        read_weights(index)


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', "\x00", "{}", '{"weight_map": ["a"]}', "[" * 100_000])
def test_a_damaged_index_is_one_line(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match="index") as error:
        read_weights(index)
    assert "\n" not in str(error.value)


def test_a_shard_that_lacks_a_tensor_or_is_not_there(tmp_path):
    from safetensors.torch import save_file

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(MissingFileError, match=r"one\.safetensors"):
        read_weights(index)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="lacks 1 tensors that the index places in it \\(b\\)"):
        read_weights(index)


def test_archives_of_other_kinds_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("../../outside.txt", "x")
    with pytest.raises(UserError, match=r"without torch's data\.pkl"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path.parent.parent / "outside.txt").exists()
    for name, words in (("a.zip", "not a weights file"), ("no.pt", "no such file")):
        (tmp_path / "a.zip").write_bytes(b"PK")
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path / name)


def test_an_archive_that_claims_to_span_disks_is_one_line(tmp_path, state):
    """What zipfile says even when it is asked whether a file is a zip."""
    torch.save({"model": state}, tmp_path / "vq.pt")
    data = (tmp_path / "vq.pt").read_bytes()
    end = data.rindex(b"PK\5\6")
    (tmp_path / "vq.pt").write_bytes(data[:end] + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2) + data[end:])
    with pytest.raises(UserError, match="not a whole torch checkpoint"):
        read_weights(tmp_path / "vq.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, state):
    """A small file could hold gigabytes of pickle."""
    torch.save({"model": state}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(UserError, match="not as torch writes it"):
        read_weights(tmp_path / "bomb.pt")


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
        read_weights(tmp_path / "vq.safetensors")


def test_a_tensor_that_claims_more_than_its_file_is_refused(tmp_path, state):
    """Strides of 0 make a terabyte of four bytes."""
    huge = torch.zeros(1).expand(1 << 20, 1 << 18)
    torch.save({"model": {**state, "quantize.embedding.weight": huge}}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match=r"claims .* more than the file holds"):
        from_checkpoint("llamagen-vq", tmp_path / "vq.pt")


def test_only_dense_tensors_are_read(tmp_path):
    torch.save({"a": torch.zeros(1), "b": torch.zeros(2, 2).to_sparse()}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="b"):
        read_weights(tmp_path / "odd.pt")


# ---- what does not fit

def test_missing_unexpected_and_misshaped_are_listed_up_to_five(tmp_path, state):
    wrong = dict(state)
    for name in [name for name in state if ".norm" in name and name.endswith(".bias")][:7]:
        del wrong[name]
    wrong |= {f"extra.{number}": torch.zeros(1) for number in range(6)}
    wrong["quant_conv.bias"] = torch.zeros(3)
    wrong["post_quant_conv.bias"] = torch.zeros(32, dtype=torch.int32)
    torch.save({"model": wrong}, tmp_path / "vq.pt")
    with pytest.raises(UserError) as error:
        from_checkpoint("llamagen-vq", tmp_path / "vq.pt")
    said = str(error.value)
    assert "7 missing (" in said
    assert "and 2 more)" in said
    assert "6 unexpected (extra.0, extra.1, extra.2, extra.3, extra.4 and 1 more)" in said
    assert "quant_conv.bias [3], which give [3] instead of [4]" in said
    assert "post_quant_conv.bias [32] of int32 instead of floats" in said
    assert "\n" not in said


def test_the_command_says_it_in_one_line_and_writes_nothing(tmp_path, state, capsys, monkeypatch):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save({"model": state, "x": Runs(os.system, "true")}, tmp_path / "hostile.pt")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    torch.save({"model": state}, tmp_path / "vq.pt")
    for argv, words in (
            (["other.pt", "out"], "is no checkpoint whose kind can be told"), (["hostile.pt", "out"], "refused"),
            (["llamagen-vq", "other.pt", "out"], "no levels numbered from 0"),
            (["taming", "other.pt", "out"], "no tensor is called"),
            (["nope.pt", "out"], "no such file or folder"), (["lamagen-vq", "vq.pt", "out"], "did you mean 'llamagen-vq'"),
            (["vq.pt", "taken"], "holds other files (diary.txt)"), (["vq.pt"], "give [KIND] SRC OUT"),
            (["llamagen-vq", "vq.pt", "out", "--config", "no.yaml"], "--config no.yaml: no such file"),
            (["llamagen-vq", "vq.pt", "out", "--like-transformers"], "--like-transformers is not read"),
            (["vq.pt", "out", "--resolution", "0"], "expected pixels of a side")):
        argv = [str(tmp_path / word) if (tmp_path / word).exists() or word in ("out", "nope.pt", "no.yaml") else word
                for word in argv]
        assert tokenloom.main(["convert", *argv]) == 2, argv
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert words.replace("no.yaml", str(tmp_path / "no.yaml")) in said.err, said.err
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "diary.txt").read_text() == "mine"


# ---- what would be lost, and what is not told

def test_the_source_and_another_projects_folder_are_never_replaced(tmp_path, state, capsys):
    """A folder of config.json and model.safetensors has the names of ours."""
    from safetensors.torch import save_file

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(state, theirs / "model.safetensors")
    torch.save({"model": state}, tmp_path / "vq.pt")
    for source in (theirs, theirs / "model.safetensors"):
        assert tokenloom.main(["convert", "llamagen-vq", str(source), str(theirs), "--resolution", "8"]) == 2
        assert "holds the source" in capsys.readouterr().err
    (theirs / "config.json").write_text('{"model_type": "janus_vqgan"}')
    assert tokenloom.main(["convert", str(tmp_path / "vq.pt"), str(theirs), "--resolution", "8"]) == 2
    assert "another project's config.json" in capsys.readouterr().err
    assert sorted(path.name for path in theirs.iterdir()) == ["config.json", "model.safetensors"]
    for _ in range(2):  # one of ours is replaced
        assert tokenloom.main(["convert", str(tmp_path / "vq.pt"), str(tmp_path / "a b"), "--resolution", "8"]) == 0
    assert f"--model '{tmp_path / 'a b'}'" in capsys.readouterr().err
    assert tokenloom.main(["convert", str(tmp_path / "a b"), str(tmp_path / "again")]) == 2
    assert "is a Tokenloom folder already" in capsys.readouterr().err


def test_the_folder_that_a_command_runs_in_is_not_replaced(tmp_path, state, monkeypatch, capsys):
    torch.save({"model": state}, tmp_path / "vq.pt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", ""):
        assert tokenloom.main(["convert", "../vq.pt", out, "--resolution", "8"]) == 2
        assert "give a name" in capsys.readouterr().err
    assert tokenloom.main(["convert", "", "out"]) == 2
    assert "empty name" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_and_the_folder_stays(tmp_path, state, capsys, value):
    bad = {**state, "quant_conv.bias": torch.tensor([0.0, value, 0.0, 0.0])}
    for name, tensors in (("good", state), ("bad", bad)):
        torch.save({"model": tensors}, tmp_path / f"{name}.pt")
    out = tmp_path / "out"
    assert tokenloom.main(["convert", str(tmp_path / "good.pt"), str(out), "--resolution", "8"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert tokenloom.main(["convert", str(tmp_path / "bad.pt"), str(out), "--resolution", "8"]) == 2
    assert "quant_conv.bias holds numbers that are not finite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "good.pt", "out"]


@pytest.mark.parametrize(("values", "words"), [
    ({"resolution": 0}, "--resolution 0: expected"), ({"resolution": 8.5}, "--resolution 8.5"), ({"resolution": -8}, "-8"),
    ({"config": "no.yaml"}, "no.yaml: no such file"), ({"config": "."}, "is a folder"),
    ({"image_tokenizer": "no"}, "no: no such folder")])
def test_options_in_python_are_checked_as_in_the_command(tmp_path, state, values, words):
    torch.save({"model": state}, tmp_path / "vq.pt")
    with pytest.raises(UserError, match=words):
        from_checkpoint("janus-vq", tmp_path / "vq.pt", **values)


def test_what_is_assumed_of_deepseeks_janus_is_said(tmp_path, state):
    torch.save(state, tmp_path / "vq.pt")
    converted = convert("janus-vq", tmp_path / "vq.pt")
    assert converted.notes == ("resolution 384: no config.json says it (--resolution)",)


@pytest.mark.parametrize("text", [
    "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "a: &a [*a]", "a: 2001-99-99", f"a: {'9' * 5000}", "[" * 5000 + "]" * 5000, "!!python/object/apply:os.system [true]"],
    ids=["doubling", "itself", "date", "digits", "deep", "tag"])
def test_a_hostile_yaml_is_one_short_line(tmp_path, text):
    from tokenloom_common.config import read_mapping

    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(UserError, match=r"model\.yaml: cannot be read") as error:
        read_mapping(tmp_path / "model.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, state, capsys, monkeypatch, ending):
    """A file's size limit stands for the disk's end."""
    torch.save({"state_dict": make_state(Shape(multipliers=(1,), attention=()))}, tmp_path / "t.ckpt")
    assert tokenloom.main(["convert", str(tmp_path / "t.ckpt"), str(tmp_path / "ours"), "--resolution", "8"]) == 0
    torch.save({"model": state}, tmp_path / "vq.pt")
    capsys.readouterr()
    there = sorted(path.name for path in tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        out = tmp_path / f"out{ending}"
        codes = [tokenloom.main(["export", "taming", str(tmp_path / "ours"), str(out)]),
                 tokenloom.main(["convert", str(tmp_path / "vq.pt"), str(tmp_path / "new"), "--resolution", "8"])]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()
    assert codes == [1, 1]
    assert len(said) == 2
    assert f"{out}: " in said[0]
    assert f"{tmp_path / 'new'}: file too large" in said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == there


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
