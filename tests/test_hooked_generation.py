"""Hooks at work: in TextToImage.generate, in `tokenloom generate`, and concepts.json in the model folder."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from inference import TextToImage, load_model_folder
from inference.hooks import Expansion, HookFailedError, Hooks
from inference.hooks.concepts_file import Concept, Concepts
from inference.image_files.read import read_recipe
from tests import command_line
from tests.command_line import contents

folder = command_line.folder
run = command_line.run

CONCEPTS = Concepts((Concept("octopus", ("animal",)), Concept("heart")), frozenset(["octopus", "animal", "heart", "red"]))
MODULE = """
import numpy

def paint(prompt):
    return prompt + " heart"

def other(prompt):
    return "octopus"

def fails(prompt):
    raise RuntimeError("no more money")

class NotTheFirst:
    def __init__(self):
        self.seen = 0
    def check_prompt(self, prompt):
        return "no hearts" if prompt == "heart" else None
    def check_images(self, images):
        self.seen += len(images)
        return ["the first one" if self.seen - len(images) + number == 0 else None for number in range(len(images))]

class Nothing(NotTheFirst):
    def check_images(self, images):
        return ["nothing"] * len(images)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_painting.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_painting", None)


@pytest.fixture(scope="module")
def knowing(folder, tmp_path_factory):
    """The tiny model with a concepts.json."""
    copy = tmp_path_factory.mktemp("models") / "knowing"
    shutil.copytree(folder, copy)
    CONCEPTS.write(copy / "concepts.json")
    return copy


@pytest.fixture(scope="module")
def model(knowing):
    return TextToImage.from_pretrained(knowing)


class Hearts:
    def expand(self, prompt):
        return Expansion("red heart" if prompt == "love" else prompt)


class NoSquares:
    """Refuses squares, and images by their number over all."""

    def __init__(self, refused=()):
        self.refused = refused

    def check_prompt(self, prompt):
        return "no squares" if "square" in prompt else None

    def check_images(self, images):
        return [f"number {number}" if number in self.refused else None for number in range(len(images))]


def test_an_expanded_prompt_is_drawn_and_both_are_told(model):
    result = model.generate(["love", "octopus"], num_images=2, hooks=Hooks(Hearts()))
    assert result.prompts == ["love", "love", "octopus", "octopus"]
    assert result.revised_prompts == ["red heart", "red heart", None, None]
    plain = model.generate(["red heart", "octopus"], num_images=2)
    assert torch.equal(result.image_tokens, plain.image_tokens)
    assert plain.revised_prompts == [None] * 4
    assert plain.refused == []


def test_attention_is_to_words_of_what_was_drawn(model):
    result = model.generate("love", hooks=Hooks(Hearts()))
    assert torch.equal(result.attention("heart"), model.generate("red heart").attention("heart"))


def test_refused_prompts_and_images_are_left_out_and_named(model):
    hooks = Hooks(None, NoSquares(refused=(1,)))
    result = model.generate(["octopus", "a square", "heart"], num_images=2, seed=[5, 7, 9], hooks=hooks)
    assert result.prompts == ["octopus", "heart", "heart"]
    assert result.seeds == [5, 9, 10]
    assert [(one.prompt, one.seed, one.reason) for one in result.refused] == [
        ("a square", None, "NoSquares: no squares"), ("octopus", 6, "NoSquares: number 1")]
    plain = model.generate(["octopus", "heart"], num_images=2, seed=[5, 9])
    assert torch.equal(result.image_tokens, plain.image_tokens[[0, 2, 3]])
    assert [image.tobytes() for image in result.images] == [plain.images[row].tobytes() for row in (0, 2, 3)]


def test_a_result_of_nothing_but_refusals_is_empty(model):
    for hooks, prompt, refused in ((Hooks(None, NoSquares()), "a square", 1), (Hooks(None, NoSquares((0, 1))), "heart", 2)):
        result = model.generate(prompt, num_images=2, hooks=hooks)
        assert result.images == result.prompts == result.seeds == result.revised_prompts == []
        assert result.image_tokens.shape == (0, model.seq2seq.config.num_tokens)
        assert len(result.refused) == refused


def test_only_images_that_were_chosen_are_screened(model):
    class Order:
        def scores(self, images, captions):
            return torch.arange(len(images)).float()[:, None]

    result = model.generate("heart", num_images=2, rerank_from=4, matcher=Order(), hooks=Hooks(None, NoSquares((0,))))
    assert result.seeds == [2]
    assert result.scores == [2.0]
    assert [one.seed for one in result.refused] == [3]


def test_a_failing_hook_fails_the_call(model):
    class Broken:
        def expand(self, prompt):
            raise RuntimeError("away")

    with pytest.raises(HookFailedError, match=r"Broken: RuntimeError: away \(.*test_hooked_generation.py, line \d+\)"):
        model.generate("heart", hooks=Hooks(Broken()))


def test_layouts_of_refused_prompts_are_left_out(tmp_path):
    from tests import tiny

    layouts = {"layout_kind": "colors", "layout_grid": (2, 2), "layout_classes": 27}
    painted = TextToImage.from_pretrained(tiny.model_folder(tmp_path / "model", **layouts))
    given = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    result = painted.generate(["a", "a square", "b"], layout=given, hooks=Hooks(None, NoSquares()))
    assert result.layouts.tolist() == [given[0], given[2]]


# ---- the model folder


def test_the_model_folder_keeps_what_it_was_trained_on(knowing, folder, model, tmp_path):
    assert load_model_folder(folder).concepts is None
    assert model.parts.concepts == CONCEPTS
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "concepts.json").read_bytes() == (knowing / "concepts.json").read_bytes()
    # a later export of the run, which knows nothing of it
    TextToImage.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert load_model_folder(tmp_path / "again").concepts == CONCEPTS


def test_a_damaged_list_is_refused_with_its_name(knowing, run, tmp_path):
    shutil.copytree(knowing, tmp_path / "model")
    (tmp_path / "model" / "concepts.json").write_text('{"format": 9}')
    shown = run("info", tmp_path / "model")
    assert shown.code == 2
    assert "concepts.json: format 9 is not read by this release" in shown.err[0]


def test_info_tells_of_it(run, knowing, folder):
    report = json.loads("\n".join(run("info", knowing, "--json").out))
    assert report["concepts"] == {"concepts": 2, "words": 4, "synonyms": 0, "styles": ""}
    assert "concepts:" in run("info", knowing).out
    assert "concepts:" not in run("info", folder).out


# ---- the command


def recipe(path):
    return read_recipe(open(path, "rb").read(), path)


def test_expand_draws_the_nearest_concept_says_so_and_records_both(run, knowing, tmp_path):
    shown = run("generate", "octopuses", "--expand", "known-concepts", "--model", knowing, "--out", tmp_path / "a")
    assert shown.code == 0
    assert shown.err[-1] == ("tokenloom generate: 'octopuses' is not among the words that this model was trained on; "
                             "drawing 'octopus'")
    (path,) = shown.out
    assert "octopuses-seed0" in path
    assert (recipe(path).prompt, recipe(path).revised_prompt) == ("octopuses", "octopus")
    plain = run("generate", "octopus", "--model", knowing, "--out", tmp_path / "b").out[0]
    assert recipe(plain).revised_prompt is None
    again = run("generate", "--from-image", path, "--out", tmp_path / "c")
    assert again.err == []
    assert contents(tmp_path / "c")["octopuses-seed0.png"] == contents(tmp_path / "a")["octopuses-seed0.png"]


def test_from_image_does_not_expand_again(run, mine, knowing):
    (path,) = run("generate", "red", "--expand", "my_painting:paint", "--model", knowing, "--out", "a").out
    assert recipe(path).revised_prompt == "red heart"
    (again,) = run("generate", "--from-image", path, "--out", "b").out
    assert recipe(again).drawn_prompt == "red heart"
    refused = run("generate", "--from-image", path, "--expand", "my_painting:other", "--out", "c")
    assert (refused.code, refused.out, len(refused.err)) == (2, [], 1)
    assert "--expand and --from-image" in refused.err[0]


def test_attention_words_are_those_of_the_revised_prompt(run, mine, knowing):
    shown = run("generate", "red", "--expand", "my_painting:paint", "--attention", "heart", "--model", knowing, "--out", "a")
    assert shown.code == 0
    assert len(shown.out) == 2


def test_a_failing_function_ends_the_command_before_anything_is_made(run, mine, knowing):
    shown = run("generate", "red", "blue", "--expand", "my_painting:fails", "--model", knowing, "--out", "a")
    assert shown.code == 1
    assert shown.err == [f"tokenloom generate: error: --expand my_painting:fails: RuntimeError: no more money "
                         f"({mine}/my_painting.py, line 11)"]
    assert not (mine / "a").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--expand", "my_painting:pain"], "has no pain; did you mean 'paint'?"), (["--expand", "x"], "--expand 'x': unknown"),
    (["--safety", "x"], "--safety 'x': unknown"), (["--safety", "words,"], "give names with commas between them"),
    (["--safety", ""], "give names with commas"), (["--safety-words", "my_painting.py"], "belongs to --safety words"),
    (["--safety", "words", "--safety-words", "nowhere.txt"], "--safety-words nowhere.txt: cannot be read")])
def test_wrong_hooks_are_refused_before_the_model_is_looked_at(run, mine, options, words):
    shown = run("generate", "red", *options, "--model", "/nowhere/model", "--out", "a")
    assert shown.code == 2
    assert words in shown.err[0]
    assert len(shown.err) == 1
    assert not (mine / "a").exists()


def test_known_concepts_need_a_model_that_has_some(run, folder, tmp_path):
    shown = run("generate", "a", "--expand", "known-concepts", "--model", folder, "--out", tmp_path / "a")
    assert shown.code == 2
    assert "the model's folder has no concepts.json" in shown.err[0]


def test_a_refused_prompt_is_said_and_the_others_are_drawn(run, folder, tmp_path):
    shown = run("generate", "p0rn", "octopus", "--safety", "words", "--model", folder, "--out", tmp_path / "a")
    assert shown.code == 1
    assert shown.err == ["tokenloom generate: 'p0rn': the prompt was refused (words: 'porn' is on the word list)"]
    assert [path.rpartition("/")[2] for path in shown.out] == ["octopus-seed0.png"]


@pytest.mark.parametrize("given", [["--safety", "my_painting:Nothing", "--safety", "words"],
                                   ["--safety", "words", "--safety", "my_painting:Nothing"]])
def test_every_safety_that_is_given_counts(run, mine, folder, given):
    shown = run("generate", "p0rn", "octopus", *given, "--model", folder, "--out", "a")
    assert (shown.code, shown.out, len(shown.err)) == (1, [], 2)
    assert "'p0rn': the prompt was refused (words:" in shown.err[0]
    assert "'octopus': the picture of seed 0 was refused (my_painting:Nothing: nothing)" in shown.err[1]


def test_refused_prompts_alone_make_no_folder(run, folder, tmp_path):
    shown = run("generate", "a nude", "--safety", "words", "--model", folder, "--out", tmp_path / "a")
    assert (shown.code, shown.out) == (1, [])
    assert not (tmp_path / "a").exists()


def test_no_file_is_written_of_a_refused_picture(run, mine, folder):
    base = ["generate", "octopus", "--num-images", 3, "--grid", "--model", folder, "--safety"]
    shown = run(*base, "my_painting:NotTheFirst", "--out", "a")
    assert shown.code == 1
    assert shown.err == [
        "tokenloom generate: 'octopus': the picture of seed 0 was refused (my_painting:NotTheFirst: the first one)"]
    assert set(contents(mine / "a")) == {"octopus-seed1.png", "octopus-seed2.png", "grid.png", "index.jsonl"}
    none = run(*base, "my_painting:Nothing", "--out", "b")
    assert (none.code, none.out, len(none.err)) == (1, [], 3)


def test_a_prompts_file_is_expanded_and_screened_as_well(run, mine, folder):
    (mine / "p.txt").write_text("red\nheart\nblue\n")
    shown = run("generate", "--prompts", "p.txt", "--expand", "my_painting:paint", "--safety", "my_painting:NotTheFirst",
                "--model", folder, "--out", "a")
    assert shown.code == 1
    assert "'heart': the prompt was refused (my_painting:NotTheFirst: no hearts)" in shown.err[0]
    assert "'red': the picture of seed 0 was refused" in shown.err[1]
    (path,) = shown.out
    assert (recipe(path).prompt, recipe(path).revised_prompt) == ("blue", "blue heart")


def test_prompts_without_a_known_word_are_noted(run, knowing, folder, tmp_path):
    shown = run("generate", "qwzrt", "red qwzrt", "--model", knowing, "--out", tmp_path / "a")
    assert shown.code == 0
    assert len(shown.err) == 1
    assert "'qwzrt': this model was trained on none of its words" in shown.err[0]
    assert run("generate", "qwzrt", "--model", folder, "--out", tmp_path / "b").err == []
    (tmp_path / "p.txt").write_text("".join(f"q{number}\n" for number in range(5)))
    many = run("generate", "--prompts", tmp_path / "p.txt", "--model", knowing, "--out", tmp_path / "c")
    assert len(many.err) == 4
    assert "2 more prompts have no word" in many.err[3]
