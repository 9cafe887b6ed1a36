"""`tokenloom reconstruct` and `tokenloom info` on a tiny model folder: what they write and say, and every wrong use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests import command_line
from tests.bad_images import ACCEPTED, REFUSED, encode, photo
from tests.command_line import contents
from tokenizer_image import VQGAN, load_tokenizer
from tokenizer_image.images import float_to_pixels, image_to_pixels, open_image, pixels_to_float
from tokenizer_image.tiling import decode_tiled, encode_tiled

folder = command_line.folder
run = command_line.run


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


def test_a_folder_among_pictures_is_refused_before_any_is_drawn(run, folder, tmp_path):
    (good,) = write(tmp_path / "in", {"cat": encode(photo(), "PNG")})
    shown = run("reconstruct", good, tmp_path, "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, shown.out) == (2, [])
    assert shown.err == [f"tokenloom reconstruct: error: {tmp_path}: not a file; give the picture itself"]
    assert not (tmp_path / "out").exists()


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
