"""A published model's byte-pair encoding: ids as min-dalle's and as BART's own tokenizer."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import torch

from inference.attention_maps import word_positions
from seq2seq import BPETokenizer, BPETokenizerConfig, load_text_source
from tests import tiny
from tokenloom_common.errors import MissingFileError, UserError
from training.config.text import TextConfig
from training.data.text_input import choose_text_source

LENGTH = 16
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
ODD = ["", " ", "  a  red   heart ", "a red heart, please!", "A RED Heart", "don't 1,234 (5%)", "tab\tand\nline",
       "é cafe\u0301 naïve", "a 🐙 and ❤️ in 東京", "👩‍👩‍👧 🇫🇷 #️⃣ ™", "İstanbul K", "<s> a </s> <mask>",
       "x" * 400, "heart " * 40, "a" * 15 + " red",
       "\x00\x7f", "_-_-_", "zzzqqq jjj"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """vocab.json and merges.txt with a few hundred pieces, BART's special ones first."""
    return bpe_files(tmp_path_factory.mktemp("bpe"))


def bpe_files(folder):
    """Write a tiny vocabulary learned from captions into a folder -> the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(tiny.CAPTIONS, trainer)
    tokenizer.model.save(str(folder))
    return folder


def source(files, **changes):
    config = BPETokenizerConfig(**{"vocab_size": 400, "text_length": LENGTH, **changes})
    return BPETokenizer.from_files(files / "vocab.json", files / "merges.txt", config)


def captions(count=300):
    """Odd ones, and words put together at random."""
    draw, words = random.Random(0), sorted({word for caption in tiny.CAPTIONS for word in caption.split()})
    parts = [*words, *words, "octopuses", "Apples", "reddish", ",", "  ", "🦊", "é", "!?", "x-ray", "42"]
    return [*ODD, *(draw.choice([" ", " ", ""]).join(draw.choices(parts, k=draw.randrange(9))) for _ in range(count))]


def test_splitting_by_spaces_gives_min_dalles_ids(files):
    from benchmarks.peers.min_dalle import _package

    _package()  # its import sets threads and gradients for the whole process, which this undoes
    from min_dalle.text_tokenizer import TextTokenizer

    theirs = TextTokenizer(json.loads((files / "vocab.json").read_text(encoding="utf8")),
                           (files / "merges.txt").read_text(encoding="utf8").split("\n")[1:-1])
    ours, cut, unknown = source(files, splitting="spaces"), 0, 0
    for caption in captions():
        expected = theirs.tokenize(caption)
        cut += len(expected) > LENGTH
        unknown += 3 in expected
        padded = [*expected, *[1] * LENGTH][:LENGTH]
        batch = ours.encode([caption])
        assert batch.text_input[0].tolist() == padded, caption
        assert torch.equal(batch.text_mask, batch.text_input != 1)
    assert cut > 5
    assert unknown == 2  # the tab and \x00, which are no pieces of a byte-level vocabulary


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("prefix_space", [True, False])
def test_splitting_by_bytes_gives_barts_ids(files, lowercase, prefix_space):
    from tokenizers.normalizers import Lowercase
    from transformers import BartTokenizerFast

    theirs = BartTokenizerFast(str(files / "vocab.json"), str(files / "merges.txt"), add_prefix_space=prefix_space,
                               split_special_tokens=True)
    if lowercase:
        theirs.backend_tokenizer.normalizer = Lowercase()
    ours = source(files, lowercase=lowercase, prefix_space=prefix_space)
    texts = [caption for caption in captions(100) if "<s>" not in caption]
    found = theirs(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    batch = ours.encode(texts)
    assert torch.equal(batch.text_input, found["input_ids"])
    assert torch.equal(batch.text_mask, found["attention_mask"].bool())


def test_names_of_special_pieces_in_a_caption_are_plain_text(files):
    for splitting in ("bytes", "spaces"):
        ids = source(files, splitting=splitting).encode(["<pad> </s>"]).text_input[0].tolist()
        assert ids.count(2) == 1
        assert 1 not in ids[: ids.index(2)]


def test_the_null_caption_begins_and_ends(files):
    for changes in ({"splitting": "bytes"}, {"splitting": "spaces"}, {"prefix_space": True}):
        ours = source(files, **changes)
        batch = ours.null_caption(2)
        assert batch.text_input.tolist() == [[0, 2, *[1] * (LENGTH - 2)]] * 2
        assert batch.text_mask.sum(dim=1).tolist() == [2, 2]
        assert torch.equal(ours.encode([""]).text_input, batch.text_input[:1])


def test_a_cut_caption_warns_once(files, caplog):
    ours = source(files, splitting="bytes")
    with caplog.at_level("WARNING"):
        assert ours.encode(["heart octopus " * 20]).text_input[0, -1] == 2
        ours.encode(["heart octopus " * 30])
    assert [f"text_length {LENGTH}" in record.message for record in caplog.records] == [True]
    assert source(files, splitting="spaces").encode(["heart octopus " * 20]).text_input[0, -1] != 2


@pytest.mark.parametrize("splitting", ["bytes", "spaces"])
def test_saved_files_are_the_same_and_give_the_same_ids(tmp_path, files, splitting):
    ours = source(files, splitting=splitting)
    loaded = load_text_source(ours.save_pretrained(tmp_path / "t"))
    assert (loaded.kind, loaded.vocab_size, loaded.feature_width, loaded.config) == ("bpe", 400, None, ours.config)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "t" / name).read_bytes() == (files / name).read_bytes()
    for other in (loaded, pickle.loads(pickle.dumps(ours))):  # as a loader worker gets it
        assert torch.equal(other.encode(ODD).text_input, ours.encode(ODD).text_input)
    assert ours.words("a Red heart") == loaded.words("a Red heart")


@pytest.mark.parametrize("splitting", ["bytes", "spaces"])
def test_the_words_of_a_caption_are_found(files, splitting):
    ours = source(files, splitting=splitting)
    words = ours.words("octopus red heart")
    assert words[0] == "<s>"
    assert words[-1] == "</s>"
    first, last = word_positions(ours, "octopus red heart", "octopus"), word_positions(ours, "octopus red heart", "heart")
    assert first[0] == 1
    assert last[-1] == len(words) - 2
    with pytest.raises(UserError, match="no word 'art'"):
        word_positions(ours, "octopus red heart", "art")


def test_a_word_of_a_million_letters_takes_no_time(files):
    assert source(files, splitting="spaces").encode(["heart" * 40_000, "a " * 400_000]).text_mask.all()


def test_spaces_have_no_other_case_and_no_prefix():
    for changes in ({"lowercase": False}, {"prefix_space": True}):
        with pytest.raises(UserError, match="splitting: spaces is always"):
            BPETokenizerConfig.parse({"vocab_size": 9, "text_length": 4, "splitting": "spaces", **changes}, "x")


def _vocab(change):
    def harm(folder):
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf8"))
        (folder / "vocab.json").write_text(json.dumps(change(vocab)))
    return harm


def _merges(change):
    def harm(folder):
        (folder / "merges.txt").write_text(change((folder / "merges.txt").read_text(encoding="utf8")), encoding="utf8")
    return harm


@pytest.mark.parametrize(("harm", "words"), [
    (lambda f: (f / "merges.txt").unlink(), "merges.txt: missing"),
    (lambda f: (f / "vocab.json").write_bytes(b"\xff{}"), "vocab.json: not UTF-8"),
    (lambda f: (f / "vocab.json").write_text("{"), "vocab.json cannot be read"),
    (lambda f: (f / "vocab.json").write_text("[" * 100_000), "vocab.json cannot be read"),
    (lambda f: (f / "vocab.json").write_text('{"a": 1%s}' % ("0" * 5000)), "vocab.json cannot be read"),
    (_vocab(lambda v: {**v, "\ud800": 399}), "vocab.json cannot be read"),
    (_vocab(lambda v: {**v, "a": True}), "not a mapping"),
    (_vocab(list), "not a mapping"),
    (_vocab(lambda v: {**v, "a": v["b"]}), "same id"),
    (_vocab(lambda v: {k: i for k, i in v.items() if k != "<pad>"}), "lacks <pad>"),
    (_vocab(lambda v: {**v, "a": 400}), "ids up to 400, the model reads 400 of them"),
    (_vocab(lambda v: {k: i for k, i in v.items() if k != "a"}), "lacks .* do not belong together"),
    (_merges(lambda text: text.split("\n", 1)[1]), "does not begin with"),
    (_merges(lambda text: text.replace("\n", "\nx\n", 1)), "merges.txt, line 2: expected two pieces"),
    (_merges(lambda text: text + "Ġred Ġred\n"), "do not belong together")])
def test_damaged_files_are_named(tmp_path, files, harm, words):
    folder = source(files).save_pretrained(tmp_path / "t")
    harm(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_text_source(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_large_files_are_not_read(tmp_path, files, monkeypatch):
    folder = source(files).save_pretrained(tmp_path / "t")
    monkeypatch.setattr("seq2seq.bpe_tokenizer.MAX_FILE_BYTES", 100)
    with pytest.raises(UserError, match="too large for a vocabulary"):
        load_text_source(folder)


def test_names_beyond_the_models_table_are_let_be(tmp_path, files):
    folder = source(files).save_pretrained(tmp_path / "t")
    _vocab(lambda v: {**v, "<mask>": 4000})(folder)
    assert load_text_source(folder).words("a red heart")


@pytest.mark.parametrize(("module", "splitting"), [("tokenizers", "bytes"), ("emoji", "spaces")])
def test_a_missing_package_is_named_with_its_extra(files, monkeypatch, module, splitting):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'tokenloom\[text\]'"):
        source(files, splitting=splitting).encode(["a 🐙"])
    assert source(files, splitting="spaces").encode(["an octopus"]).text_mask.any()


def test_captions_must_be_text(files):
    with pytest.raises(UserError, match="expected text"):
        source(files).encode([b"bytes"])
    with pytest.raises(MissingFileError, match="no such model folder"):
        BPETokenizer.from_pretrained("nowhere/at/all")


def test_a_run_reads_captions_with_a_folder_of_it(tmp_path, files):
    folder = source(files).save_pretrained(tmp_path / "t")
    found = choose_text_source(TextConfig(tokenizer=str(folder)), None, None)
    assert isinstance(found, BPETokenizer)
