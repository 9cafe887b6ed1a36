"""concepts.json, and the expander that knows what a model was trained on."""

from __future__ import annotations

import json

import pytest

from inference.hooks import concepts_file
from inference.hooks.concepts_file import Concept, Concepts, folder_concepts, read_concepts
from inference.hooks.expansion import Expansion
from inference.hooks.known_concepts import KnownConcepts, unknown_note
from tokenloom_common.errors import UserError

NAMES = {"octopus": ["animal", "sea"], "dog": ["animal", "pet"], "hot dog": ["food"], "sailboat": ["boat", "sea"],
         "motor boat": ["boat"], "couch and lamp": ["couch", "lamp"], "red apple": ["fruit"], "green apple": ["fruit"],
         "turkey": ["bird"], "flag: Turkey": ["country"], "elephant": ["animal"], "dress": ["elegant"]}
WORDS = frozenset(word for name, keywords in NAMES.items() for text in (name, *keywords)
                  for word in text.lower().replace(":", "").split()) | {"noto", "blob", "style", "a", "with", "joyful"}
CONCEPTS = Concepts(tuple(Concept(name, tuple(keywords)) for name, keywords in NAMES.items()), WORDS, ("noto", "noto-blob"),
                    {"sofa": "couch", "ship": "boat", "burger": "food", "gigantic": "red"})
KNOWN = KnownConcepts(CONCEPTS)


@pytest.mark.parametrize(("prompt", "drawn"), [
    ("a doggy", "dog"), ("two dogs", "dog"), ("doggies", "dog"), ("octopuses", "octopus"),  # inflections
    ("a sofa", "couch and lamp"), ("an octopus on a ship", "octopus"),  # synonyms; the thing itself comes first
    ("octupus", "octopus"), ("an elefant", "elephant"),  # spelling, names before other words
    ("speedboat", "motor boat"),  # a compound's last part
    ("gigantic apple", "red apple"), ("a hotdog dog", "dog"), ("turkeys", "turkey"),
    ("🐙", "octopus"), ("🐙🐘!", "octopus"),  # symbols by their names
    ("doggy, noto style", "dog, noto style"), ("doggy in noto-blob style", "dog, noto blob style")])
def test_an_unknown_word_becomes_the_nearest_known_concept(prompt, drawn):
    assert KNOWN.expand(prompt).prompt == drawn


@pytest.mark.parametrize("prompt", [
    "", "octopus", "a dog with a lamp", "dog, noto style", "My  DOG!", "dog's lamp", "please draw a picture of the sea"])
def test_a_prompt_of_known_words_stays_as_it_is(prompt):
    assert KNOWN.expand(prompt) == Expansion(prompt)


def test_the_note_names_the_words_and_what_is_drawn():
    assert KNOWN.expand("a doggy").note == (
        "'doggy' is not among the words that this model was trained on; drawing 'dog'")
    assert KNOWN.expand("a doggy on a sofa").note.startswith("'doggy' and 'sofa' are not among the words")
    assert KNOWN.expand("zzx qqy wwv kkj dog").note.startswith("'zzx', 'qqy', 'wwv' and 1 more are not among")


def test_a_prompt_near_to_nothing_is_drawn_as_it_stands_and_that_is_said():
    assert KNOWN.expand("qwzrt") == Expansion("qwzrt", "'qwzrt' is not among the words that this model was trained on, "
                                              "and nothing near is; drawing it as it stands")
    # a word that no concept has, but captions do
    assert KNOWN.expand("joyful qwzrt").prompt == "joyful qwzrt"


def test_without_synonyms_words_alone_decide():
    plain = KnownConcepts(Concepts(CONCEPTS.concepts, CONCEPTS.words))
    assert plain.expand("a sofa").prompt == "a sofa"
    assert plain.expand("a doggy").prompt == "dog"


def test_a_prompt_without_any_known_word_is_noted():
    assert "none of its words" in unknown_note(CONCEPTS, "qwzrt kkj")
    assert "none of its words" in unknown_note(CONCEPTS, "猫")
    for prompt in ("a dog", "qwzrt dog", "", "the", "a picture of the"):
        assert unknown_note(CONCEPTS, prompt) is None


@pytest.mark.parametrize("prompt", ["\0", "a" * 10_000, "word " * 2_000, "\ud800", "\u202e\u0301", "''''", "🏳️‍🌈" * 50])
def test_no_prompt_makes_it_fail(prompt):
    assert isinstance(KNOWN.expand(prompt).prompt, str)
    unknown_note(CONCEPTS, prompt)


# ---- the file


def values():
    return {"format": 1, "concepts": [{"name": "dog", "keywords": ["pet"]}], "styles": ["noto"], "words": ["dog", "pet"],
            "synonyms": {"hound": "dog"}}


def test_what_is_written_is_read_again(tmp_path):
    CONCEPTS.write(tmp_path / "concepts.json")
    assert read_concepts(tmp_path / "concepts.json") == CONCEPTS
    assert folder_concepts(tmp_path) == CONCEPTS
    assert folder_concepts(tmp_path / "elsewhere") is None


def test_styles_keywords_and_synonyms_may_be_missing():
    read = Concepts.parse({"format": 1, "concepts": [{"name": "dog"}], "words": ["dog"]}, "x")
    assert read == Concepts((Concept("dog"),), frozenset(["dog"]))


@pytest.mark.parametrize(("change", "words"), [
    ({"format": 2}, "format 2 is not read by this release"), ({"format": None}, "format None"),
    ({"concepts": []}, "concepts is empty"), ({"concepts": {}}, "concepts: expected a list, got dict"),
    ({"concepts": ["dog"]}, r"concepts\[0\]: expected an object, got str"),
    ({"concepts": [{"name": ""}]}, r"concepts\[0\].name: expected text"),
    ({"concepts": [{"name": "a\x1b[2J"}]}, r"concepts\[0\].name: .*control character"),
    ({"concepts": [{"name": "x" * 201}]}, "expected text of 1 to 200 characters"),
    ({"concepts": [{"name": "a", "keyword": []}]}, "unknown field 'keyword'"),
    ({"concepts": [{"name": "a", "keywords": [3]}]}, r"keywords\[0\]: expected text"),
    ({"words": None}, "words: expected a list, got NoneType"), ({"words": [1]}, r"words\[0\]: expected text"),
    ({"styles": "noto"}, "styles: expected a list"), ({"synonyms": []}, "synonyms: expected an object"),
    ({"synonyms": {"hound": "wolf"}}, r"synonyms\['hound'\]: 'wolf' is not one of words"),
    ({"more": 1}, "unknown field 'more'")])
def test_a_wrong_file_is_refused_by_the_field(tmp_path, change, words):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(values() | change))
    with pytest.raises(UserError, match=words) as refused:
        read_concepts(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("content", "words"), [
    (b"", "not JSON"), (b"{", "not JSON"), (b"[" * 100_000, "not JSON"), (b"[]", "expected an object, got list"),
    (b"\xff\xfe\xff", "not UTF-8")])
def test_what_is_no_json_is_refused(tmp_path, content, words):
    (tmp_path / "concepts.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        folder_concepts(tmp_path)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "concepts.json"
    path.write_text(json.dumps(values()))
    monkeypatch.setattr(concepts_file, "MAX_CONCEPTS", 0)
    with pytest.raises(UserError, match="1 entries, at most 0 are read"):
        read_concepts(path)
    monkeypatch.setattr(concepts_file, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="larger than"):
        read_concepts(path)
