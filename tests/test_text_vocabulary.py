"""Text vocabularies: captions of more characters than the vocabulary holds, and hardly any captions, train all the same."""

from __future__ import annotations

import hashlib
import random

import pytest

from seq2seq.text_tokenizer import END, GAP, LEAST_VOCAB_SIZE, NULL, TextTokenizer
from tokenloom_common.errors import UserError


def drawn(characters: list[str], count: int, length: int = 12, between: str = "") -> list[str]:
    draw = random.Random(0)
    # a frequent half and a rare half, as in real text
    return [between.join(characters[int(len(characters) * draw.random() ** 2)] for _ in range(length)) for _ in range(count)]


HAN = [chr(0x4E00 + number) for number in range(3000)]
HANGUL = [chr(0xAC00 + number * 3) for number in range(2500)]
EMOJI = [chr(0x1F300 + number) for number in range(700)]
JAPANESE = [chr(0x3041 + number) for number in range(80)] + HAN[:1500] + EMOJI[:300]
MANY = {"chinese": drawn(HAN, 1500), "korean": drawn(HANGUL, 1000, between=" "), "japanese and emoji": drawn(JAPANESE, 1500),
        "emoji": drawn(EMOJI, 400, 3, " cat "), "no character twice": ["".join(HAN[i:i + 10]) for i in range(0, 3000, 10)]}


@pytest.mark.parametrize("vocab_size", [LEAST_VOCAB_SIZE, 500])
@pytest.mark.parametrize("name", MANY)
def test_more_characters_than_the_vocabulary_holds_are_spelled_in_bytes(caplog, name, vocab_size):
    captions = MANY[name]
    tokenizer = TextTokenizer.train(captions, vocab_size, text_length=64)
    assert tokenizer.vocab_size == vocab_size

    (record,) = caplog.records
    different = len({character for caption in captions for character in caption if character != " "})
    assert f"text.vocab_size {vocab_size} has room for {vocab_size - 261} of the captions' {different:,} " in record.message
    for caption in (captions[0], captions[-1], "猫 한 \U0001f980"):
        ids = tokenizer.encode([caption]).text_input[0].tolist()
        assert tokenizer._pieces.decode(ids[:ids.index(END)]) == caption
    assert not any(GAP in tokenizer._pieces.id_to_piece(number) for number in range(vocab_size))


def test_the_most_frequent_characters_have_pieces_of_their_own(caplog):
    captions = ["abcabcabc" * 3, *HAN[:300]]
    tokenizer = TextTokenizer.train(captions, 270, 32)
    pieces = {tokenizer._pieces.id_to_piece(number) for number in range(270)}
    assert {"a", "b", "c", "\u2581"} <= pieces
    assert "27 of the captions' " not in caplog.text
    assert "has room for 9 of the captions' 303 different characters" in caplog.text


def test_the_same_captions_in_any_order_give_the_same_model():
    one = TextTokenizer.train(MANY["korean"], 400, 16)
    other = TextTokenizer.train(reversed(MANY["korean"]), 400, 16)
    assert one.model_proto == other.model_proto


@pytest.mark.parametrize(("captions", "vocab_size"), [
    (["a red cat", "a blue dog", "x"], 299), (["a red cat"] * 100, 278), (["a"], 263), (["0", "1"], 265), (["\U0001f600"], 263),
    (["a\0b", "c"], 266), (["a red cat sat " * 20_000], 283), (["\ud83d", "ab"], 268)],
    ids=["three", "one, repeated", "one letter", "two digits", "one emoji", "a NUL", "one of 280 kB", "half a surrogate pair"])
def test_a_vocabulary_may_be_larger_than_the_captions_fill(caplog, captions, vocab_size):
    tokenizer = TextTokenizer.train(captions, 2048, 16)
    assert tokenizer.vocab_size == vocab_size
    assert caplog.records == []
    ids = tokenizer.encode([captions[0][:9]]).text_input[0].tolist()
    assert NULL not in ids


@pytest.mark.parametrize("captions", [[""], ["  ", " ", "\u3000"], ["\t", "\n"], ["\u200b"]])
def test_captions_without_a_character_are_refused_in_our_words(captions):
    with pytest.raises(UserError, match=r"^no captions to train a text tokenizer on: all of them are empty or white space$"):
        TextTokenizer.train(captions, 300, 16)


def test_a_vocabulary_without_room_is_refused_with_the_least():
    with pytest.raises(UserError, match=r"^text.vocab_size 263 is too small; give at least 264 "):
        TextTokenizer.train(["a"], 263, 16)


def test_a_failure_of_the_library_names_none_of_its_options():
    with pytest.raises(UserError, match=r"no text tokenizer could be trained with text.vocab_size 300 on 1 ") as caught:
        TextTokenizer.train(["\u2585\u2585"], 300, 16)  # the sign by which SentencePiece marks unknown characters
    assert "--" not in str(caught.value)
    assert "coverage" not in str(caught.value)


@pytest.mark.parametrize(("captions", "vocab_size", "digest"), [
    (["a red cat", "a blue dog", "x"], 300, "58574c72"), (["a red cat"], 2048, "22e497f9"),
    ([chr(0x1F300 + number) + " cat" for number in range(600)], 2048, "c47b8d10")])
def test_captions_that_fit_give_the_models_of_before(captions, vocab_size, digest):
    model = TextTokenizer.train(captions, vocab_size, 16).model_proto
    assert hashlib.md5(model).hexdigest().startswith(digest)
