"""What turns captions into text input: class names, frozen encoders, and features kept on disk."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from seq2seq import ClassLabels, FrozenTextEncoder, TextTokenizer, load_text_source
from seq2seq.class_labels import ClassLabelsConfig
from tests import tiny
from tokenloom_common.errors import MissingFileError, UserError
from training.config.text import TextConfig
from training.data.text_features import CachedFeatures, open_features, write_features
from training.data.text_input import choose_text_source

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


def test_classes_without_names_are_their_numbers_and_the_null_class_is_the_last():
    labels = ClassLabels(ClassLabelsConfig(classes=tuple(map(str, range(1000)))))
    assert labels.encode(["207", "0", "999", ""]).text_input.flatten().tolist() == [207, 0, 999, 1000]
    assert labels.vocab_size == 1001
    with pytest.raises(UserError, match="unknown class '1000'"):
        labels.encode(["1000"])


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
    assert (encoder.null_caption().text_input[0] - batch.text_input[3]).abs().max() < 1e-5
    assert encoder.words("a red heart") == ["[CLS]", "a", "red", "heart", "[SEP]"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder with a T5 of two tiny layers."""
    return tiny.t5_folder(tmp_path_factory.mktemp("t5"))


def test_a_frozen_encoder_is_padded_on_the_side_that_is_asked_for(t5):
    right, left = (FrozenTextEncoder.load(str(t5), LENGTH, padding=side) for side in ("right", "left"))
    ours, theirs = right.encode(CAPTIONS), left.encode(CAPTIONS)
    for row, real in enumerate(ours.text_mask.sum(dim=1).tolist()):
        assert theirs.text_mask[row].tolist() == [False] * (LENGTH - real) + [True] * real
        assert torch.equal(theirs.text_input[row, LENGTH - real:], ours.text_input[row, :real])
        assert (theirs.text_input[row, : LENGTH - real] == 0).all()
    assert ours.text_mask.sum(dim=1).tolist() == [4, 6, 2]
    assert left.words(CAPTIONS[0]) == ["a", "red", "heart", "</s>"]
    asked = TextConfig(kind="frozen", encoder=str(t5), text_length=LENGTH, padding="left")
    assert choose_text_source(asked, None, None).config == left.config


def test_null_features_stand_for_no_caption_under_each_captions_mask(t5, tmp_path):
    null = torch.randn(LENGTH, 24, generator=torch.Generator().manual_seed(0)).half()
    source = FrozenTextEncoder.load(str(t5), LENGTH, padding="left", null_features=null)
    loaded = load_text_source(source.save_pretrained(tmp_path / "t"))
    assert loaded.null_features.dtype == torch.float16
    assert (loaded.config.padding, loaded.config.null_features) == ("left", True)
    captions = loaded.encode(CAPTIONS)
    without = loaded.null_for(captions)
    assert loaded.null_each
    assert torch.equal(without.text_mask, captions.text_mask)
    assert torch.equal(without.text_input, null.float().expand(3, -1, -1))
    empty = loaded.encode(["", "octopus", " "])
    assert torch.equal(empty.text_input[[0, 2]], without.text_input[:2])
    assert empty.text_mask.all(dim=1).tolist() == [True, False, True]
    assert torch.equal(loaded.null_caption(2).text_input, without.text_input[:2])


def test_other_sources_have_one_null_caption_for_all(t5, encoder):
    for source in (encoder, ClassLabels.collect(["dog"]), tiny.text_tokenizer()):
        ours, null = source.null_for(source.encode(["dog", "dog"])), source.null_caption()
        assert all(torch.equal(a, b) for a, b in zip(ours, null, strict=True))
        assert not source.null_each


@pytest.mark.parametrize(("harm", "words"), [
    (lambda f: f.unlink(), "missing; copy"), (lambda f: f.write_bytes(b"no"), "not a whole safetensors file"),
    (lambda f: save_file({"null": torch.zeros(3, 24)}, f),
     r"expected one tensor 'null' \[10, 24\], found {'null': \(3, 24\)}")])
def test_damaged_null_features_are_named(t5, tmp_path, harm, words):
    folder = FrozenTextEncoder.load(str(t5), LENGTH, null_features=torch.zeros(LENGTH, 24)).save_pretrained(tmp_path / "t")
    harm(folder / "null.safetensors")
    with pytest.raises(UserError, match=words):
        load_text_source(folder)


def test_a_folder_of_before_has_neither(tmp_path, encoder):
    folder = encoder.save_pretrained(tmp_path / "t")
    config = json.loads((folder / "config.json").read_text())
    old = {name: value for name, value in config.items() if name not in ("padding", "null_features")}
    (folder / "config.json").write_text(json.dumps(old))
    loaded = load_text_source(folder)
    assert (loaded.config.padding, loaded.null_features) == ("right", None)
    assert not (folder / "null.safetensors").exists()


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


def test_cached_features_know_padding_and_null_features(tmp_path, t5):
    source = FrozenTextEncoder.load(str(t5), LENGTH, padding="left", null_features=torch.ones(LENGTH, 24))
    write_features(tmp_path / "cache", source, CAPTIONS)
    features = pickle.loads(pickle.dumps(CachedFeatures(source, tmp_path / "cache")))
    kept, fresh = features.encode([CAPTIONS[2], "", CAPTIONS[1]]), source.encode([CAPTIONS[2], "", CAPTIONS[1]])
    assert torch.equal(kept.text_mask, fresh.text_mask)
    assert (kept.text_input - fresh.text_input).abs().max() < 2e-3
    assert (kept.text_input[1] == 1).all()
    plain = FrozenTextEncoder.load(str(t5), LENGTH)  # which may share the folder, and has no null features
    shared, fresh = CachedFeatures(plain, tmp_path / "cache").encode([""]), plain.encode([""])
    assert torch.equal(shared.text_mask, fresh.text_mask)
    assert (shared.text_input - fresh.text_input).abs().max() < 2e-3


def test_cached_features_lie_where_the_encoders_own_tokenizer_puts_them(tmp_path):
    bert = tiny.bert_folder(tmp_path / "bert")
    path = bert / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    source = FrozenTextEncoder.load(str(bert), LENGTH)
    write_features(tmp_path / "cache", source, CAPTIONS)
    kept, fresh = CachedFeatures(source, tmp_path / "cache").encode(CAPTIONS), source.encode(CAPTIONS)
    assert not fresh.text_mask[0, 0]
    assert torch.equal(kept.text_mask, fresh.text_mask)
    assert (kept.text_input - fresh.text_input).abs().max() < 2e-3


def test_a_cache_is_made_once_and_again_for_new_captions(tmp_path, encoder, monkeypatch):
    folder, calls = tmp_path / "cache", []
    monkeypatch.setattr("training.data.text_features.write_features", lambda *a: (calls.append(1), write_features(*a)))
    open_features(encoder, folder, CAPTIONS[:1], may_write=True)
    open_features(encoder, folder, CAPTIONS[:1], may_write=True)
    assert len(calls) == 1
    grown = open_features(encoder, folder, CAPTIONS[1:], may_write=True)
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
