"""`tokenloom data concepts`: what a captioned data set shows, as concepts.json."""

from __future__ import annotations

import json

import pytest

from inference.hooks.concepts_file import read_concepts
from seq2seq import FrozenTextEncoder
from tests import command_line, tiny
from tests.source_files import (
    PNG,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_parquet,
)
from tokenloom_common.errors import DataError, UserError
from training.data import concepts
from training.data.concepts import build_concepts, find_synonyms

run = command_line.run

ROWS = [("octopus", "noto", ["octopus", "octopus, sea, animal", "an octopus emoji", "octopus in the noto style"]),
        ("octopus", "twemoji", ["octopus", "octopus (ocean) in the twemoji style", "kraken, twemoji style"]),
        ("red heart", "noto", ["red heart", "red heart, love: in the noto style", "red heart in the noto style"]),
        ("dog", "noto", ["dog", "dog, animal", "dog: in the noto style"]), ("cat", "noto", ["cat", "cat: in the noto style"]),
        ("owl", "noto", ["owl", "owl: in the noto style"])]


@pytest.fixture
def data(tmp_path):
    names, styles, captions = zip(*ROWS, strict=True)
    return write_parquet(tmp_path / "data" / "train.parquet", [PNG] * len(ROWS), list(captions), style=list(styles),
                         base=list(names)).parent


def test_concepts_keywords_styles_and_words_are_collected(data):
    found = build_concepts(data)
    assert [concept.name for concept in found.concepts] == ["octopus", "red heart", "dog", "cat", "owl"]
    # neither phrases that hold the name, nor what nearly all have
    assert found.concepts[0].keywords == ("sea", "animal", "ocean", "in the twemoji style", "kraken", "twemoji style")
    assert found.concepts[1].keywords == ("love",)
    assert found.styles == ("noto", "twemoji")
    assert {"octopus", "an", "kraken", "love", "style"} <= found.words
    assert found.synonyms is None


def test_the_command_writes_the_file_and_says_what_is_in_it(run, data, tmp_path):
    out = tmp_path / "concepts.json"
    shown = run("data", "concepts", data, "--out", out)
    assert shown.code == 0
    assert shown.out == [f"{out}: 5 concepts, 2 styles, 21 words, {out.stat().st_size} bytes"]
    assert read_concepts(out) == build_concepts(data)
    assert run("data", "concepts", data, "--out", out).code == 0  # an earlier one is replaced


def test_plain_folders_have_concepts_too(tmp_path):
    for number, caption in enumerate(("a dog", "a cat")):
        (tmp_path / f"{number}.png").write_bytes(PNG)
        (tmp_path / f"{number}.txt").write_text(caption)
    found = build_concepts(tmp_path)
    assert sorted(concept.name for concept in found.concepts) == ["a cat", "a dog"]
    assert found.styles == ()


def test_long_captions_name_no_concept(tmp_path):
    (tmp_path / "0.png").write_bytes(PNG)
    (tmp_path / "0.txt").write_text("word " * 100)
    with pytest.raises(DataError, match="no caption is short enough to name a concept"):
        build_concepts(tmp_path)


def test_of_too_many_concepts_the_most_frequent_stay(data, monkeypatch):
    monkeypatch.setattr(concepts, "MAX_CONCEPTS", 2)
    assert [concept.name for concept in build_concepts(data).concepts] == ["octopus", "red heart"]


@pytest.mark.parametrize(("options", "words"), [
    (["--other-words", "x.txt"], "--other-words belongs to --text-encoder"),
    (["--text-encoder", "t", "--other-words", "nowhere.txt"], "--other-words nowhere.txt: cannot be read"),
    (["--text-encoder", "nowhere/at/all"], "nowhere/at/all"), (["--split", "test"], "test"),
    (["--caption-column", "no"], "no column|caption_column|'no'")])
def test_wrong_uses_are_one_line(run, data, tmp_path, options, words):
    shown = run("data", "concepts", data, "--out", tmp_path / "c.json", *options)
    assert shown.code == 2
    assert any(word in shown.err[-1] for word in words.split("|"))
    assert not (tmp_path / "c.json").exists()


def test_a_file_of_others_is_not_replaced(run, data, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"mine": 1}))
    shown = run("data", "concepts", data, "--out", tmp_path / "c.json")
    assert shown.code == 2
    assert "exists and is not" in shown.err[0]


# ---- synonyms


@pytest.mark.long
def test_the_nearest_known_word_is_found_by_the_encoder(tmp_path, run, data):
    encoder = FrozenTextEncoder.load(str(tiny.bert_folder(tmp_path / "bert")), 8)
    # a word that the encoder does not know has the features of every other such word
    assert find_synonyms(encoder, {"zzz"}, {"qqq"}) == {"zzz": "qqq"}
    assert find_synonyms(encoder, {"zzz"}, {"qqq", "yyy"}, frozenset(["yyy"])) == {"zzz": "yyy"}
    assert find_synonyms(encoder, set(), {"qqq"}) == find_synonyms(encoder, {"zzz"}, {"7"}) == {}


@pytest.mark.long
def test_an_encoder_without_parts_of_words_is_refused(tmp_path, data):
    with pytest.raises(UserError, match=r"--text-encoder .*does not tell words from parts of words"):
        build_concepts(data, text_encoder=str(tiny.bert_folder(tmp_path / "bert")))


@pytest.mark.long
def test_synonyms_of_the_vocabulary_and_of_a_file_are_written(tmp_path, data, run):
    encoder = tiny.bert_folder(tmp_path / "bert")
    vocabulary = (encoder / "vocab.txt").read_text()
    (encoder / "vocab.txt").write_text(vocabulary.replace("apple\n", "##apple\n"))
    import transformers

    (encoder / "tokenizer.json").unlink()
    transformers.BertTokenizerFast(vocab=str(encoder / "vocab.txt")).save_pretrained(encoder)
    (tmp_path / "words.txt").write_text("zebra\nZurich\nx\nit's\n")
    out = tmp_path / "c.json"
    shown = run("data", "concepts", data, "--out", out, "--text-encoder", encoder, "--other-words", tmp_path / "words.txt")
    assert shown.code == 0
    synonyms = read_concepts(out).synonyms
    assert "synonyms, " in shown.out[0]
    assert not set(synonyms) & {"Zurich", "x", "s", "octopus"}
    assert set(synonyms.values()) <= read_concepts(out).words
