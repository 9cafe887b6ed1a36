"""What a conversion refuses, in one line, before it writes anything; and what it never replaces."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from torch import Tensor

import tokenloom
from inference.checkpoints import convert, from_checkpoint
from tests.hostile_files import Runs
from tests.vqgan_references import Shape, make_state
from tokenloom_common.errors import UserError

SMALL = Shape(multipliers=(1,), attention=(), names="llamagen", dim=4, codes=16)
SIDE = 8


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state(SMALL)


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
            (["llamagen-vq", "other.pt", "out"], "no tensor is called encoder.conv_in.weight"),
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
    for out, remedy in ((".", "give a name"), ("", "OUT is empty; give a folder")):
        assert tokenloom.main(["convert", "../vq.pt", out, "--resolution", "8"]) == 2
        assert remedy in capsys.readouterr().err
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


@pytest.mark.long
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
