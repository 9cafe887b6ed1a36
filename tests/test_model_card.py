"""Model cards: metadata that the Hub reads, filled from the run, its data and what was measured; nothing made up."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from inference import MatcherConfig
from tests import tiny
from tokenizer_image import VQGAN, load_tokenizer
from tokenloom import TextToImage
from tokenloom_common.errors import UserError
from tokenloom_common.model_card import CardFacts, Measurement, model_card, read_metadata
from training.config.matcher import MatcherRunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.data.origin import data_origin, write_origin
from training.runs.cards import matcher_card, seq2seq_card, tokenizer_card

ATTRIBUTION = "# Attribution\n\n| style | authors |\n|---|---|\n| round | Ada |\n"
REPORT = {"psnr": 21.25, "codebook_usage": 0.5, "codebook_perplexity": 12.5, "pictures": 9}


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder as `tokenloom data emoji` leaves one."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\n---\n# Emoji\n")
    (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    return folder


def tokenizer_run(path: object, **values) -> TokenizerRunConfig:
    return TokenizerRunConfig.parse({"run_dir": "runs/secret", "data": {"path": str(path), "validation_split": "held_out"},
                                     **values}, "test")


def test_a_tokenizers_card_says_data_recipe_metrics_and_licence(data):
    run = tokenizer_run(data, seed=7, optim={"lr": 0.002}, train={"steps": 1234, "batch_size": 48})
    card = ModelCard(tokenizer_card(run, tiny.vqgan(), 4321, REPORT))
    assert card.data.library_name == "tokenloom"
    assert card.data.license == "unknown"
    assert card.data.tags == ["tokenloom", "image-tokenizer", "vqgan"]
    found = {(one.metric_type, one.metric_value, one.dataset_name, one.dataset_split) for one in card.data.eval_results}
    assert found == {("psnr", 21.25, "emoji", "held_out"), ("codebook_usage", 0.5, "emoji", "held_out"),
                     ("codebook_perplexity", 12.5, "emoji", "held_out")}
    for words in ("| training pictures | 4,321 (`emoji`) |", "| steps x batch | 1,234 x 48 |",
                  "| optimizer | adamw, learning rate 0.002 (cosine)", "| seed | 7 |",
                  "| held-out PSNR, dB, on `held_out` | 21.2500 |",
                  "Nobody has chosen a licence", "The data says `other` of itself", "| round | Ada |", "lr: 0.002"):
        assert words in card.text, words
    assert "secret" not in card.content  # where the run was is nobody's business
    assert "begun with" not in card.text
    tuned = tokenizer_run(data, init_from="some-one/start", model={"kind": "vqgan"})
    assert "| begun with the weights of | `some-one/start` |" in tokenizer_card(tuned, tiny.vqgan(), 4321, REPORT)


def test_the_card_section_names_licence_and_notes(data):
    run = tokenizer_run(data, card={"license": "cc-by-4.0", "notes": "Made for a **test**."})
    card = ModelCard(tokenizer_card(run, tiny.vqgan(), 1, None))
    assert card.data.license == "cc-by-4.0"
    assert "Made for a **test**." in card.text and "Nobody has chosen" not in card.text
    assert card.data.eval_results is None and "| quality | not measured |" in card.text
    with pytest.raises(UserError, match=r"card\.license"):
        tokenizer_run(data, card={"license": "Apache License"})


def test_the_other_cards_have_their_metrics(data):
    model = tiny.seq2seq()
    run = Seq2SeqRunConfig.parse({"run_dir": "r", "image_tokenizer": "t",
                                  "data": {"path": str(data), "validation_split": "held_out"}}, "test")
    card = ModelCard(seq2seq_card(run, model.config, 10, 1.5))
    assert card.data.pipeline_tag == "text-to-image"
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("loss", 1.5), ("perplexity", 4.481689)]
    assert "| transformer | 2 + 2 layers, width 32 |" in card.text

    config: MatcherConfig = tiny.matcher().config
    matcher_run = MatcherRunConfig.parse({"run_dir": "r", "data": {"path": str(data), "validation_split": "held_out"}}, "test")
    report = {"captions": 40, "top1": 0.25, "chance_top1": 0.025, "top5": 0.75}
    card = ModelCard(matcher_card(matcher_run, config, 10, report))
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("accuracy", 0.25),
                                                                                       ("top_5_accuracy", 0.75)]
    assert "among 40, top 1 (chance 0.025)" in card.text


def test_a_hub_data_set_is_named_in_the_metadata():
    card = ModelCard(tokenizer_card(tokenizer_run("some-one/pictures"), tiny.vqgan(), 1, REPORT))
    assert card.data.datasets == ["some-one/pictures"]
    assert card.data.eval_results[0].dataset_type == "some-one/pictures"


def test_token_shards_pass_on_where_their_data_comes_from(data, tmp_path):
    for origin in (data_origin(str(data)), data_origin("some-one/pictures")):
        tokens = tmp_path / f"tokens of {origin.name.replace('/', ' ')}"
        tokens.mkdir()
        write_origin(origin, tokens, "Tokens.")
        assert data_origin(str(tokens)) == origin
    assert data_origin(str(tmp_path / "nowhere" / "x.tar")).name == "x.tar"


def test_a_converted_models_card_says_from_where_and_under_which_licence():
    text = model_card(CardFacts(
        title="VQGAN: f16", summary="Converted.", usage="load()", license="mit", source="`other/vqgan` (its own repository)",
        measured=(Measurement("rFID", "fid", 4.98765, "ImageNet", "validation"),), task="image-to-image"))
    card = ModelCard(text)
    assert card.data.model_name == "VQGAN: f16"
    assert card.data.license == "mit"
    assert (card.data.eval_results[0].task_type, card.data.eval_results[0].dataset_type) == ("image-to-image", "imagenet")
    assert "Converted from `other/vqgan` (its own repository), whose terms hold for the weights." in card.text


@pytest.mark.parametrize("text", ["", "no metadata", "---\n[1\n---\n", "---\n- a\n---\n", "---\nlicense: mit"])
def test_a_card_without_metadata_has_none(text):
    assert read_metadata(text) == {}


@pytest.mark.long
def test_a_loaded_model_keeps_its_card(data, tmp_path):
    text = tokenizer_card(tokenizer_run(data), tiny.vqgan(), 1, REPORT)
    folder = tiny.vqgan().save_pretrained(tmp_path / "a", card=text)
    again = load_tokenizer(folder).save_pretrained(tmp_path / "b")
    assert (again / "README.md").read_text() == text
    assert VQGAN.from_pretrained(again).card == text
    (again / "README.md").unlink()
    assert VQGAN.from_pretrained(again).card is None
    whole = TextToImage.from_pretrained(tiny.model_folder(tmp_path / "c"), device="cpu")
    assert whole.parts.card == "# tiny\n"
