"""`tokenloom ...` on a tiny model folder: what it writes and says, and every wrong use in one line with its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image

import tokenloom
from tests import launching, tiny
from tests.bad_images import ACCEPTED, REFUSED, encode, photo
from tokenizer_image import VQGAN, load_tokenizer
from tokenizer_image.images import float_to_pixels, image_to_pixels, open_image, pixels_to_float
from tokenizer_image.tiling import decode_tiled, encode_tiled

BAR = re.compile(r"(generate|reconstruct): +\d+%\|")  # tqdm's lines on stderr


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without the progress bar


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys, monkeypatch):
    """tokenloom.main with arguments -> exit code, lines of stdout, lines of stderr."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = tokenloom.main([str(a) for a in arguments])
        except SystemExit as stopped:  # argparse's --help
            code = stopped.code
        shown = capsys.readouterr()
        return Ran(code, shown.out.splitlines(), [line for line in shown.err.splitlines() if line and not BAR.match(line)])
    return call


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {}


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
    (["zzz"], "valid names: convert, data, estimate, evaluate"),
    (["--model"], "unknown command '--model'"), ([""], "unknown command ''")])
def test_an_unknown_command_is_one_line_with_the_nearest_name(run, argv, words):
    shown = run(*argv)
    assert shown.code == 2
    assert shown.out == []
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom: error: unknown command")
    assert words in shown.err[0]


def test_no_command_shows_the_help_and_fails(run):
    shown = run()
    assert shown.code == 2
    assert shown.out[0].startswith("usage: tokenloom COMMAND")


def test_every_public_name_is_there():
    for name in tokenloom.__all__:
        assert getattr(tokenloom, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'TextToimage'"):
        _ = tokenloom.TextToimage


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
    assert [p.name for p in (tmp_path / "new/out").iterdir()] == ["a-red-heart-seed0.png"]
    with Image.open(shown.out[0]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))


def test_several_pictures_get_a_grid_and_seed_plus_i(run, folder, tmp_path):
    shown = run("generate", "octopus", "a red heart", "--num-images", 3, "--seed", 5, "--model", folder, "--out", tmp_path)
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
        *(f"a-red-heart-seed{seed}{part}.png" for seed in (0, 1) for part in parts), "grid.png"]
    pictures = [Image.open(path).tobytes() for path in shown.out[:6]]
    assert len(set(pictures)) == 6


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
    command = ["generate", "octopus", "--num-images", 2, "--model", folder, "--out", tmp_path]
    first = run(*command)
    before = contents(tmp_path)
    second = run(*command)
    assert not set(first.out) & set(second.out)
    assert [Path(p).name for p in second.out] == ["octopus-seed0-1.png", "octopus-seed1-1.png", "grid-1.png"]
    assert {name: contents(tmp_path)[name] for name in before} == before


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
    ([], "required: --model, --out"), (["a"], "required: --model, --out"),
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


# ---- reconstruct ----

def write(folder: Path, pictures: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, data in pictures.items():
        (folder / f"{name}.img").write_bytes(data)
    return sorted(folder.iterdir())


def test_reconstruct_shows_the_original_beside_what_the_tokenizer_keeps(run, folder, tmp_path):
    (path,) = write(tmp_path / "in", {"cat": encode(photo(20, 20), "PNG")})
    shown = run("reconstruct", path, "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, shown.err) == (0, [])
    name, decibel = shown.out[0].split("\t")
    assert name == str(tmp_path / "out/cat-reconstruction.png")
    tokenizer = VQGAN.from_pretrained(folder / "tokenizer_image")
    pixels = image_to_pixels(open_image(path), 16)
    rebuilt = float_to_pixels(tokenizer.decode(tokenizer.encode(pixels_to_float(pixels[None]))))[0].numpy()
    both = numpy.asarray(Image.open(name))
    assert both.shape == (16, 34, 3)
    assert (both[:, :16] == pixels).all()
    assert (both[:, 18:] == rebuilt).all()
    error = ((pixels.astype(float) - rebuilt) ** 2).mean()
    assert decibel == f"{10 * numpy.log10(255**2 / error):.2f} dB"


def test_reconstruct_in_tiles_keeps_a_large_pictures_own_size(run, folder, tmp_path):
    large, small = write(tmp_path / "in", {"large": encode(photo(50, 37), "PNG"), "small": encode(photo(15, 40), "PNG")})
    shown = run("reconstruct", large, "--model", folder, "--tiles", "--out", tmp_path / "out")
    assert (shown.code, shown.err) == (0, [])
    both = numpy.asarray(Image.open(tmp_path / "out/large-reconstruction.png"))
    assert both.shape == (36, 48 + 2 + 48, 3)  # cells of 4 pixels
    pixels = numpy.asarray(open_image(large))[0:36, 1:49]
    assert (both[:, :48] == pixels).all()
    tokenizer = load_tokenizer(folder / "tokenizer_image")
    image = pixels_to_float(pixels[None])
    assert (both[:, 50:] == float_to_pixels(decode_tiled(tokenizer, encode_tiled(tokenizer, image)))[0].numpy()).all()
    refused = run("reconstruct", small, "--model", folder, "--tiles", "--out", tmp_path / "out")
    assert refused.code == 2
    assert "15 x 40 pixels, tiles need 16 x 16 or more" in refused.err[0]
    assert len(refused.err) == 1


def test_reconstruct_takes_every_readable_picture_and_a_bare_tokenizer_folder(run, folder, tmp_path):
    paths = write(tmp_path / "in", {name.replace(" ", "_"): data for name, data in ACCEPTED.items()})
    before = contents(tmp_path / "in")
    shown = [run("reconstruct", *paths, "--model", model, "--out", tmp_path / out)
             for model, out in ((folder, "a"), (folder / "tokenizer_image", "b"))]
    for one in shown:
        assert (one.code, one.err, len(one.out)) == (0, [], len(ACCEPTED))
        assert all(re.fullmatch(r".*-reconstruction\.png\t-?\d+\.\d\d dB", line) for line in one.out)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == len(ACCEPTED)
    assert contents(tmp_path / "in") == before


@pytest.mark.parametrize("name", REFUSED)
def test_an_unreadable_picture_alone_is_its_reason_in_one_line_and_exit_code_2(run, folder, tmp_path, name):
    (path,) = write(tmp_path / "in", {"bad": REFUSED[name][0]})
    shown = run("reconstruct", path, "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert shown.err[0].startswith(f"tokenloom reconstruct: error: {path}: {REFUSED[name][1]}")
    assert contents(tmp_path / "out") == {}
    assert path.read_bytes() == REFUSED[name][0]


def test_among_good_pictures_bad_ones_are_named_and_skipped_and_the_exit_code_is_1(run, folder, tmp_path):
    bad = write(tmp_path / "bad", {name: data for name, (data, _) in REFUSED.items()})
    good = write(tmp_path / "good", {"cat": encode(photo(), "PNG"), "dog": encode(photo(seed=1), "JPEG")})
    shown = run("reconstruct", good[0], *bad, good[1], "--model", folder, "--out", tmp_path / "out")
    assert shown.code == 1
    assert [Path(line.split("\t")[0]).name for line in shown.out] == ["cat-reconstruction.png", "dog-reconstruction.png"]
    assert len(shown.err) == len(bad)
    for path, line in zip(bad, shown.err, strict=True):
        assert line.startswith(f"tokenloom reconstruct: skipped: {path}: {REFUSED[path.stem][1]}")
    assert {p.stem: p.read_bytes() for p in bad} == {name: data for name, (data, _) in REFUSED.items()}


def test_when_no_picture_is_readable_the_exit_code_is_2(run, folder, tmp_path):
    bad = write(tmp_path / "bad", {name: data for name, (data, _) in REFUSED.items()})
    shown = run("reconstruct", *bad, "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], len(bad) + 1)
    assert shown.err[-1] == f"tokenloom reconstruct: error: none of {len(bad)} pictures could be read"


def test_pictures_of_one_name_and_runs_after_one_another_never_overwrite(run, folder, tmp_path):
    paths = [write(tmp_path / name, {"cat": encode(photo(seed=seed), "PNG")})[0] for seed, name in enumerate("ab")]
    first = run("reconstruct", *paths, "--model", folder, "--out", tmp_path / "out")
    before = contents(tmp_path / "out")
    second = run("reconstruct", *paths, "--model", folder, "--out", tmp_path / "out")
    assert len(set(first.out + second.out)) == len(contents(tmp_path / "out")) == 4
    assert before.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize(("argv", "words"), [
    (["{tmp}/nowhere.png"], "nowhere.png: no such file"), (["{tmp}"], "not a file"), ([], "required: image"),
    (["{tmp}/nowhere.png", "--model", "{tmp}"], "config.json is missing"),
    (["{tmp}/nowhere.png", "--model", "{tmp}/nothing"], "no such model folder"),
    (["{tmp}/nowhere.png", "--model", "{model}/seq2seq"], "kind of image tokenizer 'encoder_decoder'"),
])
def test_wrong_uses_of_reconstruct_are_one_line_and_exit_code_2(run, folder, tmp_path, argv, words):
    filled = [a.format(tmp=tmp_path, model=folder) for a in argv]
    shown = run("reconstruct", *filled, *([] if "--model" in filled else ["--model", folder]), "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert shown.err[0].startswith("tokenloom reconstruct: error: ")
    assert words in shown.err[0]


# ---- info ----

def test_info_says_what_the_folder_holds(run, folder):
    shown = run("info", folder)
    assert (shown.code, shown.err) == (0, [])
    assert shown.out[0] == f"folder: {folder}"
    lines = [line.split() for line in shown.out]
    count = sum(p.numel() for p in VQGAN.from_pretrained(folder / "tokenizer_image").parameters())
    assert ["parameters", f"{count:,}"] in lines
    for words in (["kind", "vqgan"], ["kind", "encoder_decoder"], ["codebook_size", "32"], ["top_k", "8"],
                  ["text_length", "12"]):
        assert words in lines


def test_info_as_json_is_one_document(run, folder):
    shown = run("info", folder, "--json")
    report = json.loads("\n".join(shown.out))
    assert (shown.code, shown.err) == (0, [])
    assert report.keys() == {"folder", "image_tokenizer", "seq2seq", "text_tokenizer", "generation"}
    assert report["image_tokenizer"]["codebook_size"] == report["seq2seq"]["codebook_size"] == 32
    assert report["seq2seq"]["grid"] == [4, 4]
    assert report["generation"]["guidance_scale"] == 2.0


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    (lambda f: (f / "model_index.json").write_text("{"), "cannot be read"),
    (lambda f: shutil.rmtree(f / "text_tokenizer"), "text_tokenizer/ is missing"),
    (lambda f: (f / "seq2seq/model.safetensors").write_bytes(b"x" * 50), "not a whole safetensors file"),
    (lambda f: (f / "tokenizer_image/config.json").write_text("[]"), "expected a mapping"),
])
def test_a_damaged_folder_is_one_line_in_every_command(run, folder, tmp_path, damage, words):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    for command in (["info", copy], ["info", copy, "--json"], ["generate", "a", "--model", copy, "--out", tmp_path / "o"]):
        shown = run(*command)
        assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
        assert shown.err[0].startswith(f"tokenloom {command[0]}: error: {copy}")
        assert words in shown.err[0]
