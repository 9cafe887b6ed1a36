"""`tokenloom generate --from-image`: the same bytes again, what replaces the recipe, and recipes that cannot be followed."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import inference.commands.draw_captions as draw_captions
from inference.image_files.encode import encode_image
from inference.image_files.read import read_recipe, read_recipes
from tests import command_line, tiny
from tests.command_line import contents
from tokenloom import TextToImage

folder = command_line.folder
run = command_line.run


def drawn(run, *arguments) -> list[Path]:
    """The files of `tokenloom generate ...`, which must succeed and say nothing else."""
    shown = run("generate", "--threads", 1, *arguments)
    assert (shown.code, shown.err) == (0, [])
    return [Path(line) for line in shown.out]


def recipe_of(path: Path):
    return read_recipe(path.read_bytes(), str(path))


# ---- the same bytes again


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_is_drawn_again_byte_for_byte(run, folder, tmp_path, output_format):
    first = drawn(run, 'say "a red heart",\n🐙', "--num-images", 3, "--seed", 5, "--top-k", 5, "--negative-prompt", "blue",
                  "--guidance-schedule", "cosine", "--guidance-power", 2, "--model", folder, "--out", tmp_path / "a",
                  "--output-format", output_format)
    (again,) = drawn(run, "--from-image", first[1], "--out", tmp_path / "b")
    assert again.read_bytes() == first[1].read_bytes()
    assert again.name == first[1].name == f"say-a-red-heart-seed6.{'jpg' if output_format == 'jpeg' else output_format}"


@pytest.mark.long
def test_200_random_prompts_are_drawn_again_byte_for_byte(run, folder, tmp_path, monkeypatch):
    """Of all planes of Unicode, with quotes, commas and new lines; each again by a command of its own."""
    loaded: dict[tuple, TextToImage] = {}

    def once(model, device, revision, text_encoder, matcher, weights):
        key = (str(model), weights)
        if key not in loaded:
            loaded[key] = TextToImage.from_pretrained(model, device, weights=weights)
        return loaded[key]

    class Loading:
        from_pretrained = staticmethod(once)

    monkeypatch.setattr(draw_captions, "TextToImage", Loading)
    chance = random.Random(0)
    signs = "\"',:;\n\t\\{}<>&|`$()-–é漢字かな한글קטןعربى🐙🎉👩‍👩‍👧ß\u2028\ufeff\x07"
    prompts = []
    for _ in range(200):
        plane = [chr(chance.choice([*range(1, 0xD800), *range(0xE000, 0x110000)])) for _ in range(chance.randrange(4))]
        words = plane + chance.choices(signs, k=chance.randrange(9)) + chance.choices(["a", "red ", "heart "], k=3)
        chance.shuffle(words)
        prompts.append("(" + "".join(words))
    for output_format, some in (("png", prompts[:120]), ("jpeg", prompts[120:160]), ("webp", prompts[160:])):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in some))
        files = drawn(run, "--prompts", tmp_path / "p.jsonl", "--model", folder, "--out", tmp_path / output_format,
                      "--output-format", output_format)
        assert sorted(recipe_of(file).prompt for file in files) == sorted(some)
        for number, file in enumerate(files):
            (again,) = drawn(run, "--from-image", file, "--out", tmp_path / f"{output_format}{number}")
            assert again.read_bytes() == file.read_bytes()


def test_a_grid_is_drawn_again_with_all_its_pictures(run, folder, tmp_path):
    first = drawn(run, "octopus", "a red heart", "--num-images", 2, "--grid", "--model", folder, "--out", tmp_path / "a")
    assert first[-1].name == "grid.png"
    assert read_recipes(first[-1].read_bytes(), "grid") == [recipe_of(path) for path in first[:-1]]
    drawn(run, "--from-image", first[-1], "--grid", "--out", tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_the_order_of_a_batch_does_not_show_in_a_picture(run, folder, tmp_path):
    together = drawn(run, "octopus", "--num-images", 5, "--model", folder, "--out", tmp_path / "a")
    for path in together:
        (alone,) = drawn(run, "--from-image", path, "--out", tmp_path / "b")
        assert alone.read_bytes() == path.read_bytes()


def test_the_precision_that_drew_it_is_taken_again(run, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--weights", "int8", "--model", folder, "--out", tmp_path / "a")
    assert recipe_of(first).extra["weights"] == "int8"
    (again,) = drawn(run, "--from-image", first, "--out", tmp_path / "b")
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.long
def test_a_layout_is_part_of_the_recipe(run, tmp_path):
    model = tiny.model_folder(tmp_path / "model", layout_kind="colors", layout_classes=27, layout_grid=(2, 2))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (first,) = drawn(run, "octopus", "--layout", tmp_path / "red.png", "--model", model, "--out", tmp_path / "a")
    assert recipe_of(first).extra["layout"] == [18] * 4
    os.remove(tmp_path / "red.png")
    (again,) = drawn(run, "--from-image", first, "--out", tmp_path / "b")
    assert again.read_bytes() == first.read_bytes()
    (sampled,) = drawn(run, "octopus", "--model", model, "--out", tmp_path / "c")
    assert "layout" not in recipe_of(sampled).extra
    (again,) = drawn(run, "--from-image", sampled, "--out", tmp_path / "d")
    assert again.read_bytes() == sampled.read_bytes()


@pytest.mark.long
def test_the_chosen_of_many_keeps_its_score_and_matcher(run, folder, tmp_path):
    matcher = tiny.matcher_folder(tmp_path / "matcher")
    first = drawn(run, "a red heart", "--rerank-from", 5, "--matcher", matcher, "--num-images", 2, "--model", folder,
                  "--out", tmp_path / "a")
    (again,) = drawn(run, "--from-image", first[0], "--out", tmp_path / "b")
    assert again.read_bytes() == first[0].read_bytes()
    (other,) = drawn(run, "--from-image", first[0], "--seed", 99, "--out", tmp_path / "c")
    assert "score" not in recipe_of(other).extra
    # the recipe's matcher chooses again, from the recipe's seed on
    anew = drawn(run, "--from-image", first[0], "--seed", 0, "--rerank-from", 5, "--num-images", 2, "--out", tmp_path / "d")
    assert [path.read_bytes() for path in anew] == [path.read_bytes() for path in first]


def test_a_model_that_has_moved_draws_the_same_file(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "here")
    (first,) = drawn(run, "octopus", "--model", tmp_path / "here", "--out", tmp_path / "a")
    os.rename(tmp_path / "here", tmp_path / "there")
    shown = run("generate", "--from-image", first, "--out", tmp_path / "b")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert f"was drawn by the model '{tmp_path / 'here'}', and there is no such folder here" in shown.err[0]
    assert "--model" in shown.err[0]
    assert contents(tmp_path / "b") == {}
    (again,) = drawn(run, "--from-image", first, "--model", tmp_path / "there", "--out", tmp_path / "b")
    assert again.read_bytes() == first.read_bytes()


# ---- options replace the recipe


@pytest.mark.parametrize(("options", "changes"), [
    (["--seed", 8], {"seed": 8}), (["a red heart"], {"prompt": "a red heart"}), (["--top-k", 3], {"top_k": 3}),
    (["--guidance", 5, "--temperature", 0.5], {"guidance_scale": 5.0, "temperature": 0.5}),
    (["--negative-prompt", "blue"], {"negative_prompt": "blue"}), (["--weights", "int8"], {"weights": "int8"})])
def test_an_option_replaces_what_the_recipe_says(run, folder, tmp_path, options, changes):
    (first,) = drawn(run, "octopus", "--seed", 3, "--min-p", 0.01, "--model", folder, "--out", tmp_path / "a")
    (other,) = drawn(run, "--from-image", first, "--out", tmp_path / "b", "--", *options) if options[0] == "a red heart" else (
        drawn(run, "--from-image", first, *options, "--out", tmp_path / "b"))
    assert recipe_of(other).values() == {**recipe_of(first).values(), **changes}


def test_more_pictures_take_the_seeds_that_follow(run, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--seed", 3, "--model", folder, "--out", tmp_path / "a")
    again = drawn(run, "--from-image", first, "--num-images", 3, "--output-format", "webp", "--out", tmp_path / "b")
    assert [path.name for path in again] == [f"octopus-seed{seed}.webp" for seed in (3, 4, 5)]


def test_a_revised_prompt_is_drawn_and_both_stay(run, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--model", folder, "--out", tmp_path / "a")
    revised = replace(recipe_of(first), prompt="a kraken", revised_prompt="octopus")
    (tmp_path / "kraken.png").write_bytes(encode_image(Image.open(first), recipe=revised))
    (again,) = drawn(run, "--from-image", tmp_path / "kraken.png", "--out", tmp_path / "b")
    assert again.name == "a-kraken-seed0.png"
    assert again.read_bytes() == (tmp_path / "kraken.png").read_bytes()


# ---- what cannot be as it was is said


def test_another_model_is_warned_of_and_written_down(run, folder, tmp_path):
    other = tiny.model_folder(tmp_path / "other", seed=1)
    (first,) = drawn(run, "octopus", "--model", folder, "--out", tmp_path / "a")
    shown = run("generate", "--from-image", first, "--model", other, "--out", tmp_path / "b")
    assert (shown.code, len(shown.err)) == (0, 1)
    before, after = recipe_of(first), recipe_of(Path(shown.out[0]))
    assert f"was drawn by another model (fingerprint {before.model_fingerprint}, this one has " in shown.err[0]
    assert after.model_fingerprint != before.model_fingerprint
    assert after.model == str(other)


def written(path: Path, like: Path, **changes) -> Path:
    """A copy of a picture whose recipe says something else."""
    recipe = recipe_of(like)
    extra = {**recipe.extra, **changes.pop("extra", {})}
    path.write_bytes(encode_image(Image.open(like), recipe=replace(recipe, extra=extra, **changes)))
    return path


def test_what_this_version_does_not_know_is_said(run, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--model", folder, "--out", tmp_path / "a")
    newer = written(tmp_path / "newer.png", first, extra={"brush": "soft"})
    shown = run("generate", "--from-image", newer, "--out", tmp_path / "b")
    assert (shown.code, len(shown.err)) == (0, 1)
    assert "does not know brush of the recipe; the picture may differ" in shown.err[0]
    assert "brush" not in recipe_of(Path(shown.out[0])).extra
    unsigned = written(tmp_path / "unsigned.png", first, model_fingerprint=None)
    shown = run("generate", "--from-image", unsigned, "--out", tmp_path / "c")
    assert (shown.code, len(shown.err)) == (0, 1)
    assert "no fingerprint" in shown.err[0]


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": "somebody/model", "extra": {"revision": "main"}}, "was drawn by the model 'somebody/model'"),
    ({"extra": {"matcher": "somebody/clip"}, "options": ["--rerank-from", 2]}, "its matcher 'somebody/clip' is no folder here"),
    ({"model": ""}, "was drawn by the model ''"), ({"model": "\0"}, "was drawn by the model"),
    ({"extra": {"weights": "int7"}}, "unknown weights"), ({"extra": {"layout": [1, 2]}}, "trained without layouts"),
    ({"prompt": "x" * 10_001}, "10,001 characters"), ({"seed": 2**63 - 1, "num": 2}, "seed must be at most")])
def test_a_recipe_that_cannot_be_followed_is_one_line(run, folder, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    (first,) = drawn(run, "octopus", "--model", folder, "--out", tmp_path / "a")
    more = ["--num-images", changes.pop("num", 1), *changes.pop("options", [])]
    bad = written(tmp_path / "bad.png", first, **changes)
    shown = run("generate", "--from-image", bad, "--out", tmp_path / "b", *more)
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert words in shown.err[0]
    assert contents(tmp_path / "b") == {}


@pytest.mark.parametrize(("options", "words"), [
    (["--from-image", "{tmp}/nowhere.png"], "--from-image {tmp}/nowhere.png: no such file"),
    (["--from-image", ""], "--from-image is empty"), (["--from-image", "{tmp}"], "give the picture itself"),
    (["--from-image", "{tmp}/plain.png"], "--from-image {tmp}/plain.png: holds no recipe"),
    (["--from-image", "{tmp}/text.png"], "--from-image {tmp}/text.png: not a picture that can be read"),
    (["--from-image", "{tmp}/plain.png", "--prompts", "{tmp}/text.png"], "--from-image and --prompts: give one of them")])
def test_wrong_files_are_one_line(run, tmp_path, options, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    shown = run("generate", *(option.format(tmp=tmp_path) for option in options), "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert words.format(tmp=tmp_path) in shown.err[0]


def test_pictures_of_several_models_on_one_grid_are_refused(run, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--model", folder, "--out", tmp_path / "a")
    recipes = [recipe_of(first), replace(recipe_of(first), model_fingerprint="f" * 16)]
    (tmp_path / "grid.png").write_bytes(encode_image(Image.open(first), recipe=recipes))
    shown = run("generate", "--from-image", tmp_path / "grid.png", "--out", tmp_path / "b")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "were drawn by several models" in shown.err[0]


# ---- the model that ships


@pytest.fixture
def shipped(folder, tmp_path, monkeypatch) -> Path:
    """The tiny model in the place of the one that ships."""
    shutil.copytree(folder, tmp_path / "shipped/emoji")
    monkeypatch.setattr("inference.shipped.SHIPPED_MODELS", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shipped/emoji"


def test_without_model_and_out_the_shipped_model_draws_into_pictures(run, shipped, folder, tmp_path):
    shown = run("generate", "octopus", "--threads", 1)
    assert (shown.code, shown.out) == (0, ["pictures/octopus-seed0.png"])
    assert len(shown.err) == 1
    for words in ("the model that ships with Tokenloom (emoji, 16 px)", "--help", "tokenloom train"):
        assert words in shown.err[0]
    (named,) = drawn(run, "octopus", "--model", folder, "--out", "named")
    assert Image.open(named).tobytes() == Image.open("pictures/octopus-seed0.png").tobytes()
    assert TextToImage.from_pretrained(device="cpu").generate("octopus").images[0].tobytes() == Image.open(named).tobytes()
    recipe = recipe_of(Path("pictures/octopus-seed0.png"))
    assert recipe.model is None
    assert recipe.model_fingerprint == recipe_of(named).model_fingerprint


def test_a_picture_of_the_shipped_model_is_drawn_again_wherever_it_lies(run, shipped, tmp_path, monkeypatch):
    run("generate", "octopus", "--threads", 1)
    os.rename(tmp_path / "shipped", tmp_path / "elsewhere")
    monkeypatch.setattr("inference.shipped.SHIPPED_MODELS", tmp_path / "elsewhere")
    shown = run("generate", "--from-image", "pictures/octopus-seed0.png", "--out", "again")
    assert Path(shown.out[0]).read_bytes() == Path("pictures/octopus-seed0.png").read_bytes()


def test_a_recipe_whose_model_is_gone_takes_the_shipped_one_of_its_fingerprint(run, shipped, folder, tmp_path):
    (first,) = drawn(run, "octopus", "--model", folder, "--out", "a")
    gone = written(tmp_path / "gone.png", first, model="served-model")
    shown = run("generate", "--from-image", gone, "--out", "b")
    assert shown.code == 0
    assert Path(shown.out[0]).read_bytes() == gone.read_bytes()


def test_info_without_a_folder_describes_the_shipped_model(run, shipped):
    shown = run("info", "--json")
    assert json.loads("\n".join(shown.out))["folder"] == str(shipped)


def test_reconstruct_takes_the_shipped_model_too(run, shipped, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    shown = run("reconstruct", "red.png")
    assert shown.code == 0
    assert shown.out[0].startswith("reconstructions/red-reconstruction.png\t")


@pytest.mark.parametrize("command", [["generate", "octopus"], ["info"], ["reconstruct", "a.png"]])
def test_an_installation_without_the_shipped_model_is_one_line(run, tmp_path, monkeypatch, command):
    monkeypatch.setattr("inference.shipped.SHIPPED_MODELS", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    shown = run(*command)
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert "the model that ships with Tokenloom is not there" in shown.err[0]
    assert contents(tmp_path) == {}
