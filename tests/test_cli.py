"""`tokenloom ...` on a tiny model folder: what it writes and says, and every wrong use in one line with its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenloom
from tests import command_line, launching, tiny
from tests.command_line import Ran, contents

folder = command_line.folder
run = command_line.run


# ---- the front door ----

def test_help_lists_every_command_with_its_line(run):
    shown = run("--help")
    assert shown.code == 0
    assert shown.err == []
    for name, (_, _, text) in tokenloom.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in shown.out)


@pytest.mark.parametrize("name", tokenloom.COMMANDS)
def test_every_command_has_help_with_examples(run, name):
    shown = run(name, "--help")
    assert shown.code == 0
    assert any(line.startswith(f"  tokenloom {name} ") for line in shown.out[shown.out.index("examples:"):])


@pytest.mark.parametrize(("argv", "words"), [
    (["generat"], "did you mean 'generate'"), (["inof"], "did you mean 'info'"),
    (["zzz"], "valid names: calibrate, convert, data, estimate"),
    (["--model"], "unknown command '--model'"), ([""], "unknown command ''")])
def test_an_unknown_command_is_one_line_with_the_nearest_name(run, argv, words):
    shown = run(*argv)
    assert shown.code == 2
    assert shown.out == []
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom: error: unknown command")
    assert words in shown.err[0]


def test_the_version_of_a_checkout_that_is_not_installed_is_unknown(run, monkeypatch):
    def not_there(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", not_there)
    assert run("--version") == (0, ["tokenloom unknown (not installed)"], [])


def test_no_command_shows_the_help_and_fails(run):
    shown = run()
    assert shown.code == 2
    assert shown.out[0].startswith("usage: tokenloom COMMAND")


def test_every_public_name_is_there():
    for name in tokenloom.__all__:
        assert getattr(tokenloom, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'TextToimage'"):
        _ = tokenloom.TextToimage


@pytest.mark.long
@pytest.mark.parametrize(("module", "absent"), [
    ("tokenloom", ("torch", "numpy", "deepspeed", "datasets", "pydantic", "x_transformers")),
    ("training.commands.data", ("torch", "deepspeed", "datasets")),
    ("inference", ("deepspeed", "datasets", "matplotlib", "pyarrow", "training")),
    ("inference.commands.generate", ("deepspeed", "datasets", "matplotlib", "pyarrow", "training")),
])
def test_importing_brings_in_only_what_is_needed(module, absent):
    code = f"import sys, {module}; sys.exit(' '.join(m for m in {absent!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=launching.REPOSITORY, env=launching.environment(), text=True,
                            capture_output=True, timeout=60, check=False)
    assert (result.stderr, result.returncode) == ("\n", 1)  # the empty list of offending modules


@pytest.mark.long
def test_the_front_door_runs_as_a_program(folder, tmp_path):
    result = subprocess.run([sys.executable, "-m", "tokenloom", "info", str(tmp_path / "nowhere")], cwd=launching.REPOSITORY,
                            env=launching.environment(), text=True, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr == (f"tokenloom info: error: {tmp_path / 'nowhere'}: no such model folder; "
                             "give the folder that training wrote as RUN/model, or a hub id\n")


def test_the_data_commands_are_reachable(run, tmp_path):
    shown = run("data", "check", tmp_path / "nowhere")
    assert shown.code == 2
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom data: error: ")
    assert "nowhere" in shown.err[0]


# ---- generate ----

def test_generate_writes_one_picture_and_says_where(run, folder, tmp_path):
    shown = run("generate", "a red heart", "--model", folder, "--out", tmp_path / "new/out")
    assert shown == Ran(0, [str(tmp_path / "new/out/a-red-heart-seed0.png")], [])
    assert sorted(contents(tmp_path / "new/out")) == ["a-red-heart-seed0.png", "index.jsonl"]
    with Image.open(shown.out[0]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))


@pytest.mark.long
def test_several_pictures_get_seed_plus_i_and_the_grid_that_is_asked_for(run, folder, tmp_path):
    shown = run("generate", "octopus", "a red heart", "--num-images", 3, "--seed", 5, "--grid", "--model", folder,
                "--out", tmp_path)
    assert [json.loads(Image.open(path).info["tokenloom"])["seed"] for path in shown.out[:-1]] == [5, 6, 7, 5, 6, 7]
    assert shown.code == 0
    assert [Path(line).name for line in shown.out] == [
        *(f"{slug}-seed{seed}.png" for slug in ("octopus", "a-red-heart") for seed in (5, 6, 7)), "grid.png"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 18 - 2, 2 * 18 - 2)
        assert grid.crop((18, 18, 34, 34)).tobytes() == Image.open(tmp_path / "a-red-heart-seed6.png").tobytes()
    alone = run("generate", "a red heart", "--seed", 7, "--model", folder, "--out", tmp_path / "alone")
    assert Image.open(alone.out[0]).tobytes() == Image.open(tmp_path / "a-red-heart-seed7.png").tobytes()


def test_the_metadata_of_a_picture_makes_it_again(run, folder, tmp_path):
    options = ["--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--temperature", 1.5, "--guidance", 3.5, "--seed", 11]
    (path,) = run("generate", "octopus ünï 🐙", *options, "--model", folder, "--out", tmp_path / "a").out
    note = json.loads(Image.open(path).info["tokenloom"])
    assert (note["prompt"], note["seed"], note["model"]) == ("octopus ünï 🐙", 11, str(folder))
    assert {k: note[k] for k in ("top_k", "top_p", "min_p", "temperature", "guidance_scale")} == {
        "top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5, "guidance_scale": 3.5}
    assert note["digitalSourceType"] == "trainedAlgorithmicMedia"
    again = run("generate", note["prompt"], "--seed", note["seed"], "--top-k", note["top_k"], "--top-p", note["top_p"],
                "--min-p", note["min_p"], "--temperature", note["temperature"], "--guidance", note["guidance_scale"],
                "--model", note["model"], "--out", tmp_path / "b")
    assert Path(again.out[0]).read_bytes() == Path(path).read_bytes()
    other = run("generate", note["prompt"], "--seed", 12, *options[:-2], "--model", folder, "--out", tmp_path / "c")
    assert Image.open(other.out[0]).tobytes() != Image.open(path).tobytes()


def test_the_model_folders_defaults_are_used_and_written_down(run, folder, tmp_path):
    (path,) = run("generate", "octopus", "--model", folder, "--out", tmp_path).out
    note = json.loads(Image.open(path).info["tokenloom"])
    assert (note["top_k"], note["guidance_scale"], note["temperature"]) == (8, 2.0, 1.0)
    model = tokenloom.TextToImage.from_pretrained(folder, device="cpu")
    assert Image.open(path).tobytes() == model.generate("octopus").images[0].tobytes()


def test_zero_top_k_is_all_and_guidance_one_is_off_not_the_default(run, folder, tmp_path):
    (path,) = run("generate", "octopus", "--top-k", 0, "--guidance", 1, "--model", folder, "--out", tmp_path).out
    note = json.loads(Image.open(path).info["tokenloom"])
    assert (note["top_k"], note["guidance_scale"]) == (0, 1.0)
    params = tokenloom.SamplingParams(top_k=0, guidance_scale=1.0)
    model = tokenloom.TextToImage.from_pretrained(folder, device="cpu")
    assert Image.open(path).tobytes() == model.generate("octopus", params=params).images[0].tobytes()


@pytest.mark.parametrize(("flag", "value"), [
    ("--top-k", 1), ("--top-p", 0.05), ("--min-p", 0.9), ("--temperature", 9), ("--guidance", 0), ("--seed", 3),
    ("--guidance-schedule", "linear"), ("--negative-prompt", "octopus")])
def test_every_sampling_flag_changes_the_picture(run, folder, tmp_path, flag, value):
    base = ["generate", "a red heart", "--model", folder, "--out", tmp_path]
    pictures = [Image.open(run(*base, *more).out[0]).tobytes() for more in ([], [flag, value])]
    assert pictures[0] != pictures[1]


def test_the_power_of_the_cosine_schedule_changes_the_picture(run, folder, tmp_path):
    base = ["generate", "a red heart", "--guidance", 9, "--guidance-schedule", "cosine", "--model", folder, "--out", tmp_path]
    pictures = [Image.open(run(*base, *more).out[0]).tobytes() for more in ([], ["--guidance-power", 4])]
    assert pictures[0] != pictures[1]


def test_attention_is_saved_beside_each_picture(run, folder, tmp_path):
    shown = run("generate", "a red heart", "--num-images", 2, "--attention", "heart", "--attention", "red", "--model", folder,
                "--out", tmp_path)
    parts = ("", "-attention-heart", "-attention-red")
    assert [Path(path).name for path in shown.out] == [
        f"a-red-heart-seed{seed}{part}.png" for seed in (0, 1) for part in parts]
    pictures = [Image.open(path).tobytes() for path in shown.out]
    assert len(set(pictures)) == 6


@pytest.mark.long
def test_a_layout_is_read_from_a_picture_or_from_numbers(run, tmp_path):
    model = tiny.model_folder(tmp_path / "model", layout_kind="colors", layout_classes=27, layout_grid=(2, 2))
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    (tmp_path / "white.json").write_text("[[26, 26], [26, 26]]")
    (tmp_path / "red.json").write_text("[[18, 18], [18, 18]]")
    (tmp_path / "bad.json").write_text("[[18,")
    base = ["generate", "a red heart", "--model", model, "--out", tmp_path / "out", "--layout"]
    drawn = {name: Image.open(run(*base, tmp_path / name).out[0]).tobytes() for name in ("white.png", "white.json", "red.json")}
    assert drawn["white.png"] == drawn["white.json"] != drawn["red.json"]
    for name, words in (("bad.json", "cannot be read"), ("none.png", "neither a picture nor"), ("none.json", "cannot be read")):
        shown = run(*base, tmp_path / name)
        assert shown.code == 2
        assert words in shown.err[-1]


def test_no_metadata_leaves_nothing_in_the_file(run, folder, tmp_path):
    (path,) = run("generate", "octopus", "--no-metadata", "--model", folder, "--out", tmp_path).out
    assert "tokenloom" not in Image.open(path).info
    assert b"octopus" not in Path(path).read_bytes()


def test_files_are_never_overwritten(run, folder, tmp_path):
    command = ["generate", "octopus", "--num-images", 2, "--grid", "--model", folder, "--out", tmp_path]
    first = run(*command)
    before = contents(tmp_path)
    second = run(*command)
    assert not set(first.out) & set(second.out)
    assert [Path(p).name for p in second.out] == ["octopus-seed0-1.png", "octopus-seed1-1.png", "grid-1.png"]
    after = contents(tmp_path)
    assert after.pop("index.jsonl").startswith(before.pop("index.jsonl"))  # which lines are added to
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("prompt", [
    "../../etc/passwd", "/absolute", "a/b\\c:d*e?f\"g<h>|i", ".hidden", "..", "", "   ", "🐙🎉", "漢字の猫", "x" * 500,
    "a\nb\tc", "-rf", "𝐀" * 100, "\udcff broken", "a\x00b", "CON  aux"])
def test_odd_prompts_become_safe_file_names(run, folder, tmp_path, prompt):
    out = tmp_path / "out"
    shown = run("generate", "--seed", 10**12, "--model", folder, "--out", out, "--", prompt)
    assert shown.code == 0, shown.err
    (path,) = map(Path, shown.out)
    assert path.parent == out
    assert path.is_file()
    assert re.fullmatch(r"[\w-]+-seed1000000000000\.png", path.name)
    assert path.name[0] not in ".-"
    assert len(os.fsencode(path.name)) < 240
    assert json.loads(Image.open(path).info["tokenloom"])["prompt"] == prompt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


WRONG_GENERATE = {
    "negative top-k": (["--top-k", "-1"], "top_k"),
    "top-k of words": (["--top-k", "many"], "--top-k"),
    "top-k of a half": (["--top-k", "1.5"], "--top-k"),
    "top-p zero": (["--top-p", "0"], "top_p"),
    "top-p above one": (["--top-p", "1.1"], "top_p"),
    "min-p above one": (["--min-p", "2"], "min_p"),
    "temperature nan": (["--temperature", "nan"], "temperature"),
    "temperature inf": (["--temperature", "inf"], "temperature"),
    "negative temperature": (["--temperature", "-1"], "temperature"),
    "guidance nan": (["--guidance", "nan"], "guidance_scale"),
    "negative guidance": (["--guidance", "-2"], "guidance_scale"),
    "unknown schedule": (["--guidance-schedule", "square"], "guidance_schedule"),
    "power without cosine": (["--guidance-power", "2"], "guidance_power is of the cosine schedule"),
    "negative prompt without guidance": (["--negative-prompt", "blue", "--guidance", "1"], "guidance_scale is 1"),
    "attention to a word that is not there": (["--attention", "violin"], "has no word 'violin'"),
    "layout for a model without": (["--layout", "{tmp}/white.png"], "trained without layouts"),
    "text encoder for a model without": (["--text-encoder", "{tmp}"], "text tokenizer of its own"),
    "no pictures": (["--num-images", "0"], "num_images"),
    "negative pictures": (["--num-images", "-3"], "num_images"),
    "batch of none": (["--batch-size", "0"], "batch_size"),
    "negative seed": (["--seed", "-1"], "seed"),
    "huge seed": (["--seed", str(10**30)], "seed"),
    "huge last seed": (["--seed", str(2**63 - 1), "--num-images", "2"], "seed"),
    "nonsense device": (["--device", "nonsense"], "--device nonsense"),
    "device without memory": (["--device", "meta"], "--device meta"),
    "empty device": (["--device", ""], "--device"),
    "misspelt flag": (["--top-kk", "3"], "--top-kk"),
    "shortened flag": (["--num", "3"], "--num"),
    "flag without a value": (["--seed"], "--seed"),
    "model missing": (["--model", "{tmp}/nowhere"], "{tmp}/nowhere: no such model folder"),
    "model is a file": (["--model", "{tmp}/file"], "{tmp}/file: is a file"),
    "model is an empty folder": (["--model", "{tmp}"], "model_index.json is missing"),
    "out is a file": (["--out", "{tmp}/file"], "--out {tmp}/file: is a file"),
    "out below a file": (["--out", "{tmp}/file/sub"], "--out {tmp}/file/sub: cannot be written to"),
}


@pytest.mark.parametrize(("more", "words"), WRONG_GENERATE.values(), ids=WRONG_GENERATE)
def test_every_wrong_use_of_generate_is_one_line_and_exit_code_2(run, folder, tmp_path, more, words):
    (tmp_path / "file").write_text("x")
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white.png")
    out = tmp_path / "out"
    shown = run("generate", "a red heart", "--model", folder, "--out", out, *(a.format(tmp=tmp_path) for a in more))
    assert shown.code == 2
    assert shown.out == []
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom generate: error: ")
    assert words.format(tmp=tmp_path) in shown.err[0]
    assert contents(out) == {}
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(("argv", "words"), [
    ([], 'no prompt given; for example: tokenloom generate "octopus"'),
    (["--model", "{model}", "--out", "{tmp}/o"], "no prompt given"),
    (["x" * 10_001, "--model", "{model}", "--out", "{tmp}/o"], "10,001 characters"),
])
def test_wrong_prompts_and_missing_flags_are_one_line(run, folder, tmp_path, argv, words):
    shown = run("generate", *(a.format(model=folder, tmp=tmp_path) for a in argv))
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert shown.err[0].startswith("tokenloom generate: error: ")
    assert words in shown.err[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_one_line(run, folder, tmp_path, device):
    for command in (["generate", "a"], ["reconstruct", tmp_path / "a.png"]):
        shown = run(*command, "--device", device, "--model", folder, "--out", tmp_path / "o")
        assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
        assert f"--device {device}: this machine has no usable GPU" in shown.err[0]
