"""What turns captions into text input: class names, frozen encoders, and features kept on disk."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from seq2seq import ClassLabels, FrozenTextEncoder, TextTokenizer, load_text_source
from tests import tiny
from tokenloom_common.errors import MissingFileError, UserError
from training.text_input import CachedFeatures, cached, write_features

CAPTIONS = ["a red heart", "a large blue apple tree", "octopus"]
LENGTH = 10


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a BERT of two tiny layers and a word vocabulary."""
    return tiny.bert_folder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(bert):
    return FrozenTextEncoder.load(str(bert), LENGTH)


def test_class_names_become_numbers():
    labels = ClassLabels.collect(["dog", "Cat", "dog", " owl "])
    assert labels.config.classes == ("Cat", "dog", "owl")
    batch = labels.encode(["DOG", "cat ", "2", ""])
    assert batch.text_input.tolist() == [[1], [0], [2], [3]]
    assert batch.text_mask.all()
    assert labels.vocab_size == 4
    assert torch.equal(labels.null_caption(2).text_input, torch.tensor([[3], [3]]))


def test_wrong_classes_are_refused_by_name():
    labels = ClassLabels.collect(["dog", "cat"])
    with pytest.raises(UserError, match="unknown class 'dogg'; did you mean 'dog'"):
        labels.encode(["dogg"])
    with pytest.raises(UserError, match="unknown class '2'"):
        labels.encode(["2"])
    with pytest.raises(UserError, match="0 different class names"):
        ClassLabels.collect(["", " "])


def test_a_frozen_encoder_gives_the_features_of_its_last_layer(bert, encoder):
    import transformers

    batch = encoder.encode([*CAPTIONS, ""])
    model = transformers.BertModel.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    assert batch.text_input.shape == (4, LENGTH, 16)
    for row, caption in enumerate([*CAPTIONS, ""]):
        alone = tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            expected = model(**alone).last_hidden_state[0]
        assert batch.text_mask[row].sum() == len(expected)
        assert (batch.text_input[row, : len(expected)] - expected).abs().max() < 1e-5
        assert (batch.text_input[row, len(expected):] == 0).all()
    assert torch.equal(encoder.null_caption().text_input[0], batch.text_input[3])
    assert encoder.words("a red heart") == ["[CLS]", "a", "red", "heart", "[SEP]"]


def test_a_long_caption_is_cut_with_one_warning(bert, caplog):
    encoder = FrozenTextEncoder.load(str(bert), 4)
    with caplog.at_level("WARNING"):
        assert encoder.encode(["a red heart"]).text_mask.all()
        encoder.encode(["a blue heart"])
    assert len(caplog.records) == 1
    assert "text_length 4" in caplog.text


def test_text_sources_are_saved_and_loaded_by_kind(tmp_path, encoder):
    sources = {"classes": ClassLabels.collect(["dog", "cat"]), "frozen": encoder, "sentencepiece": tiny.text_tokenizer()}
    for kind, source in sources.items():
        loaded = load_text_source(source.save_pretrained(tmp_path / kind))
        assert type(loaded) is type(source)
        assert (loaded.vocab_size, loaded.feature_width) == (source.vocab_size, source.feature_width)
        captions = ["dog", ""] if kind == "classes" else CAPTIONS
        assert all(torch.equal(a, b) for a, b in zip(loaded.encode(captions), source.encode(captions), strict=True))
    with pytest.raises(UserError, match="kind of text tokenizer"):
        (tmp_path / "classes" / "config.json").write_text('{"kind": "runes"}')
        load_text_source(tmp_path / "classes")
    with pytest.raises(UserError, match="text tokenizer of its own"):
        load_text_source(tmp_path / "sentencepiece", text_encoder="x")


def test_another_or_missing_encoder_is_refused(tmp_path, encoder):
    folder = encoder.save_pretrained(tmp_path / "t")
    other = tiny.bert_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="not the text encoder that the model was trained with"):
        load_text_source(folder, text_encoder=str(other))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "name": str(tmp_path / "moved")}))
    with pytest.raises(MissingFileError, match="--text-encoder"):
        load_text_source(folder)
    assert load_text_source(folder, text_encoder=encoder.config.name).config.name == str(tmp_path / "moved")


@pytest.mark.parametrize(("harm", "words"), [
    (lambda f: (f / "model.safetensors").unlink(), "no .safetensors weights"),
    (lambda f: (f / "config.json").write_text("{"), "no text encoder can be loaded"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "no text encoder can be loaded")])
def test_damaged_encoders_are_named(tmp_path, harm, words):
    folder = tiny.bert_folder(tmp_path / "bert")
    harm(folder)
    with pytest.raises(UserError, match=words):
        FrozenTextEncoder.load(str(folder), LENGTH)


def test_more_positions_than_the_encoder_has_are_refused(bert):
    with pytest.raises(UserError, match="text_length 400"):
        FrozenTextEncoder.load(str(bert), 400)


def test_cached_features_equal_fresh_ones(tmp_path, encoder):
    write_features(tmp_path / "cache", encoder, CAPTIONS)
    features = pickle.loads(pickle.dumps(CachedFeatures(encoder, tmp_path / "cache")))  # as a loader worker gets it
    kept, fresh = features.encode([CAPTIONS[2], "", CAPTIONS[1]]), encoder.encode([CAPTIONS[2], "", CAPTIONS[1]])
    assert torch.equal(kept.text_mask, fresh.text_mask)
    assert (kept.text_input - fresh.text_input).abs().max() < 2e-3
    with pytest.raises(UserError, match="no features of 1 captions"):
        features.encode(["something new"])


def test_a_cache_is_made_once_and_again_for_new_captions(tmp_path, encoder, monkeypatch):
    folder, calls = tmp_path / "cache", []
    monkeypatch.setattr("training.text_input.write_features", lambda *a: (calls.append(1), write_features(*a)))
    cached(encoder, folder, CAPTIONS[:1], may_write=True)
    cached(encoder, folder, CAPTIONS[:1], may_write=True)
    assert len(calls) == 1
    grown = cached(encoder, folder, CAPTIONS[1:], may_write=True)
    assert len(calls) == 2
    assert all(caption in grown for caption in ["", *CAPTIONS])


def test_a_cache_of_another_encoder_is_refused(tmp_path, encoder, bert):
    write_features(tmp_path / "cache", encoder, CAPTIONS)
    with pytest.raises(UserError, match="another text_length"):
        CachedFeatures(FrozenTextEncoder.load(str(bert), LENGTH - 1), tmp_path / "cache")
    other = FrozenTextEncoder.load(str(tiny.bert_folder(tmp_path / "other", seed=1)), LENGTH)
    with pytest.raises(UserError, match="another encoder"):
        CachedFeatures(other, tmp_path / "cache")
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(MissingFileError, match="delete it"):
        CachedFeatures(encoder, tmp_path / "cache")


def test_captions_must_be_text(encoder):
    for source in (encoder, ClassLabels.collect(["dog"]), tiny.text_tokenizer()):
        with pytest.raises(UserError, match=r"expected text|must be text"):
            source.encode([b"bytes"])
    assert isinstance(tiny.text_tokenizer(), TextTokenizer)
