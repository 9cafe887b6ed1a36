"""Requests that cannot be drawn are refused before a folder is made: each is named by its line of a prompts file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from inference.image_files.encode import encode_image
from inference.image_files.read import read_recipe
from tests import command_line, tiny

folder = command_line.folder
run = command_line.run
LAST_SEED = 2**63 - 1


@pytest.fixture
def refused(run, folder, tmp_path):
    """Run `tokenloom generate`, which must refuse without a folder -> its one line of stderr."""
    def call(*arguments) -> str:
        shown = run("generate", "--threads", 1, "--model", folder, "--out", tmp_path / "out", *arguments)
        assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
        assert not (tmp_path / "out").exists()
        return shown.err[0].removeprefix("tokenloom generate: error: ")
    return call


def test_a_negative_prompt_without_guidance(refused):
    assert "guidance_scale is 1" in refused("octopus", "--negative-prompt", "blue", "--guidance", 1)


def test_a_negative_prompt_of_a_picture_without_guidance_names_the_file(run, folder, refused, tmp_path):
    drawn = run("generate", "octopus", "--negative-prompt", "blue", "--model", folder, "--out", tmp_path / "first").out[0]
    line = refused("--from-image", drawn, "--guidance", 1)
    assert line.startswith(f"--from-image {drawn}: a negative prompt acts through guidance, and guidance_scale is 1")


def test_a_seed_of_which_the_last_candidate_has_none(refused, tmp_path):
    matcher = tiny.matcher_folder(tmp_path / "matcher")
    line = refused("octopus", "--seed", LAST_SEED - 2, "--rerank-from", 4, "--matcher", matcher)
    assert line.startswith(f"seed must be at most {LAST_SEED} for the last picture too")


@pytest.mark.parametrize(("line", "options", "words"), [
    ({"negative_prompt": "blue", "guidance_scale": 1}, (), "guidance_scale is 1"),
    ({"guidance_scale": 1}, ("--negative-prompt", "blue"), "guidance_scale is 1"),
    ({"seed": LAST_SEED}, ("--num-images", 2), "seed must be at most"),
    ({"layout": [0, 1]}, (), "trained without layouts"),
    ({"top_k": -1}, (), "top_k"),
    ({"guidance_scale": 3}, ("--batch-size", 1, "--guidance", 1),
     "a picture under guidance (guidance_scale 3) takes 2 rows of the batch; give --batch-size 2 or more, or "
     "guidance_scale 1")])
def test_a_line_that_cannot_be_drawn_is_named(refused, tmp_path, line, options, words):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": "octopus"}] * 3 + [{"prompt": "a red heart", **line}]
    file.write_text("\n\n".join(json.dumps(one) for one in lines))
    shown = refused("--prompts", file, *options)
    assert shown.startswith(f"{file}, line 7: ")
    assert words in shown


def test_one_row_draws_a_prompts_file_without_guidance(run, folder, tmp_path):
    (tmp_path / "p.txt").write_text("octopus\n")
    shown = run("generate", "--prompts", tmp_path / "p.txt", "--batch-size", 1, "--guidance", 1, "--threads", 1,
                "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, len(shown.out)) == (0, 1)


def test_an_expander_that_returns_too_much_is_named(run, folder, tmp_path, monkeypatch):
    (tmp_path / "my_long_expander.py").write_text("def expand(prompt):\n    return prompt * 2000\n")
    monkeypatch.chdir(tmp_path)
    shown = run("generate", "octopus", "--expand", "my_long_expander:expand", "--model", folder, "--out", "out")
    assert (shown.code, shown.out) == (1, [])
    assert shown.err == ["tokenloom generate: error: --expand my_long_expander:expand: returned 14,000 characters, the limit "
                         "is 10,000"]
    assert not (tmp_path / "out").exists()


# ---- what a picture may not decide


@pytest.fixture
def offline(monkeypatch):
    """The calls that would fetch something from the hub; none may be made."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))


@pytest.mark.parametrize(("matcher", "words"), [
    ("somebody/clip", "its matcher 'somebody/clip' is no folder here; say where it is: --matcher DIR"),
    ("", "its matcher '' is no folder here"), (None, "its recipe names no matcher for --rerank-from; give one: --matcher DIR")])
def test_the_matcher_of_a_picture_is_a_folder_or_refused(run, folder, tmp_path, offline, matcher, words):
    drawn = run("generate", "octopus", "--model", folder, "--out", tmp_path / "first").out[0]
    recipe = read_recipe(Path(drawn).read_bytes(), drawn)
    if matcher is not None:
        recipe = replace(recipe, extra={**recipe.extra, "matcher": matcher, "score": 1.0})
    (tmp_path / "sent.png").write_bytes(encode_image(Image.open(drawn), recipe=recipe))
    shown = run("generate", "--from-image", tmp_path / "sent.png", "--rerank-from", 4, "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert shown.err[0].startswith(f"tokenloom generate: error: --from-image {tmp_path / 'sent.png'}: {words}")
    assert not (tmp_path / "out").exists()


def test_expand_beside_a_picture_needs_a_caption(run, folder, tmp_path, monkeypatch):
    (tmp_path / "my_heart.py").write_text("def paint(prompt):\n    return prompt + ' heart'\n")
    monkeypatch.chdir(tmp_path)
    drawn = run("generate", "octopus", "--model", folder, "--out", "first").out[0]
    expand = ["--expand", "my_heart:paint"]
    shown = run("generate", "--from-image", drawn, *expand, "--out", "out")
    assert (shown.code, shown.out) == (2, [])
    assert shown.err == ["tokenloom generate: error: --expand and --from-image: a picture's own prompt is not expanded; give "
                         "a caption beside it, or leave --expand out"]
    assert not (tmp_path / "out").exists()
    (other,) = run("generate", "red", "--from-image", drawn, *expand, "--out", "out").out
    assert read_recipe(Path(other).read_bytes(), other).drawn_prompt == "red heart"
