"""index.jsonl beside pictures, and a prompts file that goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from inference.commands.picture_index import PictureIndex, picture_key
from inference.image_files.read import read_recipe
from inference.image_files.recipe import Recipe
from inference.sampling import SamplingParams
from tests import command_line, tiny
from tests.command_line import contents
from tokenloom_common.errors import RunFailedError

folder = command_line.folder
run = command_line.run
RECIPE = Recipe("a red heart", 7, SamplingParams(), model_fingerprint="f" * 16, extra={"weights": "float32"})


def lines_of(out: Path) -> list[dict]:
    text = (out / "index.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def draw(run, folder, tmp_path):
    """Draw a prompts file of these lines into out/ -> the command's code, files and lines of stderr."""
    def call(*lines: str, options: tuple = ()):
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        return run("generate", "--threads", 1, "--prompts", tmp_path / "p.jsonl", "--model", folder, "--out", tmp_path / "out",
                   *options)
    return call


# ---- the index


@pytest.mark.parametrize("metadata", [True, False])
def test_every_picture_has_its_line_with_its_whole_recipe(run, folder, tmp_path, metadata):
    shown = run("generate", "octopus", "a red heart", "--num-images", 2, "--grid", "--attention", "octopus", "--threads", 1,
                "--model", folder, "--out", tmp_path, *([] if metadata else ["--no-metadata"]))
    assert shown.code == 2  # not every caption has the word
    shown = run("generate", "octopus", "--num-images", 2, "--grid", "--attention", "octopus", "--threads", 1,
                "--model", folder, "--out", tmp_path, *([] if metadata else ["--no-metadata"]))
    lines = lines_of(tmp_path)
    assert [line["file"] for line in lines] == ["octopus-seed0.png", "octopus-seed1.png"]
    for line in lines:
        assert {"prompt", "seed", "top_k", "guidance_scale", "model", "model_fingerprint"} <= set(line)
        if metadata:
            recipe = read_recipe((tmp_path / line["file"]).read_bytes(), "x")
            assert {"file": line["file"], **recipe.values()} == line
    assert len(shown.out) == 5  # with attention and grid, which are no pictures of a recipe of their own


def test_lines_are_added_to_what_is_there(tmp_path):
    for number in range(3):
        PictureIndex(tmp_path).add(tmp_path / f"{number}.png", RECIPE)
    assert [line["file"] for line in lines_of(tmp_path)] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("torn", ['{"file": "1.png", "prompt": "cut', '{"file": "1.png"}', "{", "x" * 3_000_000])
@pytest.mark.parametrize("whole", [0, 2])
def test_a_torn_last_line_is_removed_and_told(tmp_path, capsys, torn, whole):
    for number in range(whole):
        PictureIndex(tmp_path).add(tmp_path / f"{number}.png", RECIPE)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write(torn)
    capsys.readouterr()
    index = PictureIndex(tmp_path)
    index.add(tmp_path / "a.png", RECIPE)
    index.add(tmp_path / "b.png", RECIPE)
    assert capsys.readouterr().err == (
        f"{tmp_path / 'index.jsonl'}: its last line was cut when it was written, and has been removed\n")
    assert [line["file"] for line in lines_of(tmp_path)] == [*(f"{number}.png" for number in range(whole)), "a.png", "b.png"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) // 2)
    with pytest.raises(RunFailedError, match="no space left on device"):
        PictureIndex(tmp_path).add(tmp_path / "a.png", RECIPE)


@pytest.mark.parametrize("there", [b"hello\n", b'{"image": "a.png"}\n', b"hello", b"\xff\xfe\n", None,
                                   b'{"file": "../a", "prompt": ""}\n'])
def test_an_index_of_something_else_is_refused_before_anything_is_loaded(run, tmp_path, there):
    if there is None:
        (tmp_path / "index.jsonl").mkdir()
    else:
        (tmp_path / "index.jsonl").write_bytes(there)
    shown = run("generate", "octopus", "--model", "/nowhere", "--out", tmp_path)
    assert (shown.code, shown.out, shown.err) == (2, [], [
        f"tokenloom generate: error: --out {tmp_path}: its index.jsonl was not written by this command; give another folder"])
    if there is not None:
        assert contents(tmp_path) == {"index.jsonl": there}


def test_lines_without_their_file_and_foreign_lines_count_for_nothing(tmp_path):
    index = PictureIndex(tmp_path)
    for name in ("here.png", "gone.png", "here.png"):
        index.add(tmp_path / name, RECIPE)
    with (tmp_path / "index.jsonl").open("a") as file:
        file.write('hello\n[]\n{"file": "../x", "prompt": "a"}\n{"file": "other.png", "prompt": "no recipe"}\n')
    (tmp_path / "here.png").touch()
    (tmp_path / "other.png").touch()
    found, names = PictureIndex(tmp_path).pictures()
    assert sum(found.values()) == 1
    assert names == {"here.png", "other.png"}


def test_the_newest_line_of_a_file_counts(tmp_path):
    newer = replace(RECIPE, seed=8)
    index = PictureIndex(tmp_path)
    index.add(tmp_path / "a.png", RECIPE)
    index.add(tmp_path / "a.png", newer)
    (tmp_path / "a.png").touch()
    found, names = PictureIndex(tmp_path).pictures()
    assert found == Counter([picture_key(newer, ".png")])
    assert names == {"a.png"}


# ---- a prompts file goes on


LINES = ['{"prompt": "octopus", "num_images": 3}', '{"prompt": "a red heart", "seed": 5, "top_k": 3}', '{"prompt": "octopus"}']


def test_a_prompts_file_is_not_drawn_twice(draw, tmp_path):
    first = draw(*LINES)
    assert (first.code, len(first.out), first.err) == (0, 5, [])
    before = contents(tmp_path / "out")
    second = draw(*LINES)
    assert (second.code, second.out, second.err) == (0, [], ["tokenloom generate: 5 of 5 there already"])
    assert contents(tmp_path / "out") == before


def test_what_is_missing_or_changed_is_drawn(draw, tmp_path):
    first = draw(*LINES)
    before = contents(tmp_path / "out")
    (tmp_path / "out/octopus-seed1.png").unlink()
    again = draw(*LINES)
    assert ([Path(path).name for path in again.out], again.err) == (
        ["octopus-seed1.png"], ["tokenloom generate: 4 of 5 there already"])
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before if name != "index.jsonl"} == {
        name: before[name] for name in before if name != "index.jsonl"}
    changed = draw(LINES[0], LINES[1].replace("3}", "4}"), LINES[2], '{"prompt": "octopus", "seed": 9}')
    assert sorted(Path(path).name for path in changed.out) == ["a-red-heart-seed5-1.png", "octopus-seed9.png"]
    assert changed.err == ["tokenloom generate: 4 of 6 there already"]
    assert len(first.out) == 5


def test_what_is_missing_of_a_line_with_a_layout_a_picture_is_drawn(run, tmp_path):
    model = tiny.model_folder(tmp_path / "model", layout_kind="colors", layout_classes=27, layout_grid=(2, 2))
    (tmp_path / "p.jsonl").write_text('{"prompt": "octopus", "num_images": 2, "layout": [[0, 1, 2, 3], [4, 5, 6, 7]]}')
    command = ["generate", "--threads", 1, "--prompts", tmp_path / "p.jsonl", "--model", model, "--out", tmp_path / "out"]
    assert run(*command).code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out/octopus-seed1.png").unlink()
    again = run(*command)
    assert (again.code, again.err) == (0, ["tokenloom generate: 1 of 2 there already"])
    assert contents(tmp_path / "out")["octopus-seed1.png"] == before["octopus-seed1.png"]


@pytest.mark.parametrize("options", [("--temperature", 0.5), ("--output-format", "webp"), ("--weights", "int8"),
                                     ("--negative-prompt", "blue")])
def test_another_option_draws_all_anew(draw, options):
    draw(LINES[1])
    again = draw(LINES[1], options=options)
    assert (len(again.out), again.err) == (1, [])


def test_pictures_without_metadata_are_known_by_the_index(draw, tmp_path):
    draw(*LINES, options=("--no-metadata",))
    again = draw(*LINES, options=("--no-metadata",))
    assert again.err == ["tokenloom generate: 5 of 5 there already"]
    assert b"octopus" not in (tmp_path / "out/octopus-seed0.png").read_bytes()


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_stop_between_a_picture_and_its_line_leaves_neither_twice(draw, tmp_path, monkeypatch, stop_after):
    add, added = PictureIndex.add, []

    def stopping(self, picture, recipe):
        if len(added) == stop_after:
            raise KeyboardInterrupt
        added.append(picture)
        add(self, picture, recipe)

    monkeypatch.setattr(PictureIndex, "add", stopping)
    assert draw(*LINES).code == 130
    monkeypatch.setattr(PictureIndex, "add", add)
    assert draw(*LINES).code == 0
    names = Counter(line["file"] for line in lines_of(tmp_path / "out"))
    assert set(names.values()) == {1}
    assert set(names) == {*contents(tmp_path / "out")} - {"index.jsonl"}
    assert len(names) == 5
    for name in names:
        Image.open(tmp_path / "out" / name).load()


def test_a_grid_of_a_prompts_file_is_refused_in_words(draw):
    shown = draw(LINES[0], options=("--grid",))
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert "--grid does not go with --prompts" in shown.err[0]
