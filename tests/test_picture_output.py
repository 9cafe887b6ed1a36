"""Pictures as `tokenloom generate` writes them: names that file systems take, sheets that formats take, memory."""

from __future__ import annotations

import weakref

import pytest
from PIL import Image

from inference.commands.picture_files import save_picture
from inference.commands.picture_output import PictureOutput
from inference.image_files.encode import FORMATS, encode_image
from inference.image_files.recipe import Recipe
from inference.sampling import SamplingParams
from tests import command_line
from tests.command_line import contents

folder = command_line.folder
run = command_line.run
RECIPE = Recipe("a red heart", 7, SamplingParams())


@pytest.mark.parametrize(("caption", "word"), [("字" * 60, "字" * 60), ("字" * 59 + " 猫", "猫"), ("字" * 60, "a" * 60)])
def test_a_long_caption_and_a_long_word_are_names_that_fit(tmp_path, caption, word):
    output = PictureOutput(tmp_path, "webp", with_metadata=True)
    recipe = Recipe(caption, (1 << 63) - 1, SamplingParams())
    for _ in range(2):
        output.save(Image.new("RGB", (4, 4)), recipe)
        output.save_overlay(Image.new("RGB", (4, 4)), recipe, word)
    names = set(contents(tmp_path)) - {"index.jsonl"}
    assert len(names) == 4
    assert len([name for name in names if f"-seed{recipe.seed}" in name]) == 4
    assert all(len(name.encode()) < 255 for name in names)


def test_a_stem_is_cut_between_characters(tmp_path):
    path = save_picture(b"x", tmp_path, "a" + "字" * 100)
    assert path.name == "a" + "字" * 73 + ".png"
    assert list(contents(tmp_path)) == [path.name]


@pytest.mark.parametrize(("with_grid", "is_kept"), [(False, False), (True, True)])
def test_pictures_are_kept_for_a_grid_alone(tmp_path, with_grid, is_kept):
    output = PictureOutput(tmp_path, "png", with_metadata=True, with_grid=with_grid)
    image = Image.new("RGB", (4, 4))
    kept = weakref.ref(image)
    output.save(image, RECIPE)
    del image
    assert (kept() is not None) == is_kept


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_side_of_a_format_is_right(name):
    side = FORMATS[name].max_side
    if name == "png":  # more than any machine has memory for
        assert side == (1 << 31) - 1
        return
    encode_image(Image.new("RGB", (side, 1)), name)
    with pytest.raises((OSError, ValueError)):
        encode_image(Image.new("RGB", (side + 1, 1)), name)


def test_a_grid_that_its_format_cannot_hold_is_refused_before_anything_is_drawn(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "webp", FORMATS["webp"]._replace(max_side=50))
    command = ["generate", "octopus", "a red heart", "--grid", "--num-images", 3, "--output-format", "webp", "--threads", 1,
               "--model", folder, "--out", tmp_path / "out"]
    shown = run(*command)  # 3 pictures of 16 px in a row, with 2 px between them: 52 px
    assert (shown.code, shown.out) == (2, [])
    assert shown.err == ["tokenloom generate: error: --grid: the sheet would have 52 x 34 pixels, and webp has at most 50 a "
                         "side; give --output-format png, or fewer pictures"]
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(FORMATS, "webp", FORMATS["webp"]._replace(max_side=52))
    assert run(*command).code == 0
    assert Image.open(tmp_path / "out/grid.webp").size == (52, 34)
