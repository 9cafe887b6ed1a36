"""Training a matcher in this process, measuring it, and starting a transformer from it; and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from inference.scoring.matcher import MAX_SCALE
from inference.scoring.matcher_folder import load_matcher
from seq2seq import PRESETS, BPETokenizer, BPETokenizerConfig, FrozenTextEncoder, TextTokenizer
from seq2seq.losses import MaskedText, masked_text_loss
from tests import tiny
from tests.test_bpe_tokenizer import bpe_files
from tokenloom_common.config import merge
from tokenloom_common.errors import MissingFileError, ResumeError, UserError
from training import train_matcher
from training.config.matcher import MatcherRunConfig
from training.data.builders.shapes import build_shapes
from training.data.sources.open_dataset import open_dataset
from training.data.visits.captioned import CaptionedVisits, CollateCaptioned
from training.data.visits.order import ItemId
from training.engine.processes import Processes
from training.evaluation.retrieval import (
    choose_pairs,
    evaluate_retrieval,
    ranks,
    retrieval_accuracy,
)
from training.loop.loop import run_training
from training.objectives.matcher import contrastive_loss
from training.runs.metrics import read_metrics
from training.train_matcher import MatcherTraining
from training.warm_start.text_encoder import (
    check_text_start,
    matcher_text_source,
    take_text_encoder,
)

IMAGE = {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "norm_groups": 4}
TEXT = {"width": 32, "heads": 2, "head_dim": 16, "layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.matcher_folder(tmp_path_factory.mktemp("matchers") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("data") / "shapes"
    build_shapes(found, size=16, num_scenes=150, seed=0, max_objects=1)
    return found


def config(folder: Path, run_dir: Path, **changes: Any) -> MatcherRunConfig:
    base = {"data": {"path": str(folder)}, "run_dir": str(run_dir), "text": {"vocab_size": 300, "text_length": 16},
            "model": {"image": IMAGE, "text": TEXT, "embed_dim": 16},
            "train": {"steps": 4, "batch_size": 12, "precision": "float32", "log_every": 1, "sample_every": 0},
            "optim": {"lr": 0.003, "warmup_steps": 0}, "checkpoint": {"every_steps": 0}}
    if changes.get("text", {}).get("kind") == "frozen":
        base["text"] = {}
    return MatcherRunConfig.parse(merge(base, changes), "test")


def train(run: MatcherRunConfig, group: Processes) -> MatcherTraining:
    training = MatcherTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


def test_words_are_hidden_from_sentencepiece_alone(data, tmp_path, group):
    files = bpe_files(tmp_path)
    text = BPETokenizer.from_files(files / "vocab.json", files / "merges.txt",
                                   BPETokenizerConfig(vocab_size=400, text_length=16)).save_pretrained(tmp_path / "text")
    changes = {"text": {"tokenizer": str(text), "vocab_size": None, "text_length": None}}
    assert MatcherTraining(config(data, tmp_path / "a", **changes), group).text_source.vocab_size == 400
    with pytest.raises(UserError, match="is of kind bpe; set it to 0"):
        MatcherTraining(config(data, tmp_path / "b", **changes, loss={"mlm_weight": 0.5}), group)


def test_a_short_training_finds_captions_far_above_chance_and_exports(data, tmp_path, group):
    run = config(data, tmp_path / "run", data={"validation_split": "train"}, loss={"mlm_weight": 0.2},
                 train={"steps": 60, "batch_size": 32, "log_every": 20, "weight_ema": 0.8})
    training = train(run, group)
    training.finish()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"contrastive", "words", "accuracy", "scale"} <= rows[0].keys()
    assert rows[-1]["contrastive"] < rows[0]["contrastive"]
    assert rows[-1]["words"] < rows[0]["words"]
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert report["chance_top1"] == pytest.approx(1 / report["captions"])
    assert report["top1"] > 3 * report["chance_top1"]
    assert report["top5"] > 3 * report["chance_top5"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    scorer = load_matcher(tmp_path / "run" / "model", device="cpu")
    again = evaluate_retrieval(scorer, open_dataset(data))
    assert {name: report[name] for name in again} == again
    assert f"{report['top1']:.4f}" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_loss_is_the_weighted_sum_of_its_parts(data, tmp_path, group):
    run = config(data, tmp_path / "run", loss={"contrastive_weight": 0.5, "mlm_weight": 2.0})
    training = MatcherTraining(run, group)
    batch = training.collate([training.visits[ItemId(0, row)] for row in range(12)])
    assert batch.masked is not None
    with torch.no_grad():
        out = training.model(batch.image, *batch.text, *batch.masked)
    expected = (0.5 * contrastive_loss(out.embeddings, out.scale, batch.same_caption)
                + 2.0 * masked_text_loss(out.text_logits, batch.text.text_input[batch.masked.predicted]))
    assert float(training.train(batch, 0)["loss"]) == pytest.approx(float(expected), abs=1e-5)


def test_what_a_visit_draws_follows_from_its_item(data, tmp_path, group):
    training = MatcherTraining(config(data, tmp_path / "run", loss={"mlm_weight": 1.0}), group)
    items = [ItemId(epoch, row) for epoch in range(3) for row in range(8)]
    whole = training.collate([training.visits[item] for item in items])
    parts = [training.collate([training.visits[item] for item in items[i: i + 1]]) for i in range(len(items))]
    assert isinstance(whole.masked, MaskedText)
    for name in ("text_ids", "predicted"):
        assert torch.equal(getattr(whole.masked, name), torch.cat([getattr(part.masked, name) for part in parts]))
    assert len({training.visits[ItemId(epoch, 0)].caption for epoch in range(30)}) > 2
    for visit in (training.visits[item] for item in items[:8]):
        assert visit.caption in training.source.captions(visit.item.index)


def test_an_unusable_picture_gives_way_to_the_next_one_with_its_own_caption(tmp_path):
    for row, word in enumerate(("one", "two", "three")):
        Image.new("RGB", (16, 16), (row * 100, 0, 0)).save(tmp_path / f"{row}.png")
        (tmp_path / f"{row}.txt").write_text(word)
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    visits = CaptionedVisits(open_dataset(tmp_path), 16, seed=0, horizontal_flip=0.0)
    visit = visits[ItemId(0, 1)]
    assert visit.caption == "three"
    assert int(visit.image.pixels[0, 0, 0]) == 200
    batch = CollateCaptioned(tiny.text_tokenizer(), 0)([visits[ItemId(0, row)] for row in range(3)])
    assert [one.reason for one in batch.dropped] == [visit.image.dropped[0].reason]
    assert batch.same_caption.tolist() == [[True, False, False], [False, True, True], [False, True, True]]


def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, group):
    values = {"train": {"steps": 4, "weight_ema": 0.5}, "optim": {"schedule": "constant"}, "checkpoint": {"every_steps": 2},
              "loss": {"mlm_weight": 0.5}, "model": {"text": {**TEXT, "dropout": 0.1}}}
    whole = train(config(data, tmp_path / "a", **values), group)
    train(config(data, tmp_path / "b", **merge(values, {"train": {"steps": 2}})), group)
    resumed = train(config(data, tmp_path / "b", **values), group)
    for one, two in ((whole.full_model().state_dict(), resumed.full_model().state_dict()),
                     (whole.engine.full_state(), resumed.engine.full_state())):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(whole.full_model().state_dict()[name], tensor)
               for name, tensor in whole.model.matcher.state_dict().items())  # the average is what is exported
    with pytest.raises(ResumeError, match="hidden words"):
        MatcherTraining(config(data, tmp_path / "b", **merge(values, {"loss": {"mlm_weight": 0.0}})), group)


@pytest.mark.parametrize(("then", "now"), [("adamw", "adafactor"), ("adafactor", "adamw")])
def test_a_resume_with_another_optimizer_is_refused_before_the_run_is_touched(data, tmp_path, group, then, now):
    def with_optimizer(name: str) -> MatcherRunConfig:
        return config(data, tmp_path / "run", deepspeed={"zero_stage": 0}, optim={"name": name})

    train(with_optimizer(then), group)
    before = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(ResumeError, match=r"another kind of run \(optim\.name"):
        MatcherTraining(with_optimizer(now), group)
    assert (tmp_path / "run/config.yaml").read_bytes() == before


@pytest.mark.parametrize("stage", [0, 1])
def test_the_temperature_stays_bounded_in_the_optimizers_copy_too(data, tmp_path, group, stage, monkeypatch):
    """With a loss that only asks for a larger scale."""
    monkeypatch.setattr("training.objectives.matcher.contrastive_loss",
                        lambda embeddings, scale, same: 0 * (embeddings.image.sum() + embeddings.text.sum()) - scale)
    training = MatcherTraining(config(data, tmp_path / "run", deepspeed={"zero_stage": stage}, train={"steps": 8}), group)
    matcher = training.model.matcher
    with torch.no_grad():
        matcher.logit_scale.fill_(MAX_SCALE - 0.02)
    training.engine.take_over([matcher.logit_scale])
    training.engine.set_lr(0.01)
    found = []
    for step, batch in enumerate(training.batches(0)):
        training.train(batch, step)
        found.append(float(training.engine.full_state()["matcher.logit_scale"]))
    assert MAX_SCALE - 0.02 < found[0] < MAX_SCALE
    assert max(found) == found[-1] == pytest.approx(MAX_SCALE)


def test_a_frozen_text_encoder_feeds_the_text_tower(data, tmp_path, group):
    text = {"kind": "frozen", "encoder": str(tiny.bert_folder(tmp_path / "bert")), "text_length": 8}
    small = {"text": {**TEXT, "layers": 0, "learned_positions": False}}
    live = train(config(data, tmp_path / "live", text=text, model=small, train={"steps": 2}), group)
    assert isinstance(live.text_source, FrozenTextEncoder)
    live.finish()
    kept = train(config(data, tmp_path / "kept", text={**text, "feature_cache": str(tmp_path / "cache")}, model=small,
                        train={"steps": 2}), group)
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("live", "kept")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    kept.finish()
    scores = [load_matcher(tmp_path / name / "model", device="cpu").scores(tiny.pictures(2), ["a red circle"])
              for name in ("live", "kept")]
    torch.testing.assert_close(scores[0], scores[1], atol=2e-2, rtol=0)
    moved = Path(shutil.move(tmp_path / "bert", tmp_path / "moved"))
    with pytest.raises(MissingFileError, match="text_encoder=FOLDER"):
        load_matcher(tmp_path / "live" / "model", device="cpu")
    load_matcher(tmp_path / "live" / "model", device="cpu", text_encoder=str(moved))


@pytest.mark.parametrize(("changes", "words"), [
    ({"text": {"kind": "classes", "vocab_size": None, "text_length": None}}, "text.kind classes has no captions"),
    ({"text": {"kind": "frozen", "encoder": "x"}, "loss": {"mlm_weight": 0.1}}, "loss.mlm_weight hides text ids"),
    ({"text": {"kind": "frozen", "encoder": "x"}, "data": {"workers": 1}}, "data.workers cannot share a text encoder"),
    ({"deepspeed": {"zero_stage": 3}}, "zero_stage 3"), ({"loss": {"contrastive_weight": 0}}, "contrastive_weight"),
    ({"model": {"text": {"preset": "smal"}}}, "did you mean 'small'"),
    ({"model": {"text": {"preset": "dalle"}}}, "unknown preset of a text encoder 'dalle'"),
    ({"model": {"text": {"widht": 8}}}, "did you mean 'model.text.width'"),
    ({"model": {"text": {"text_length": 8}}}, "text_length"),
    ({"model": {"text": {"layers": 0}}}, "layers 0 leaves"), ({"model": {"embed_dim": 1}}, "embed_dim"),
    ({"model": {"image": {"resolution": 18}}}, "cannot be halved")])
def test_impossible_options_are_refused_before_anything_is_read(changes, words, data, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        config(data, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)


def test_a_batch_without_other_captions_is_refused(data, tmp_path, group):
    with pytest.raises(UserError, match="leaves a process one picture at a time"):
        MatcherTraining(config(data, tmp_path / "run", train={"accumulation": 12}), group)
    assert not (tmp_path / "run").exists()


def test_a_preset_gives_the_text_tower_of_that_model(data, tmp_path):
    text = config(data, tmp_path, model={"text": {"preset": "dalle-mini", "dropout": 0.3}}).model.build(
        {"text_vocab_size": 300, "text_length": 10}).text
    assert (text.width, text.heads, text.layers, text.dropout) == (1024, 16, PRESETS["dalle-mini"]["encoder_layers"], 0.3)
    assert (text.norm_placement, text.embedding_norm, text.rotary) == ("normformer", True, "none")


def test_the_script_says_its_options_and_mistakes_in_one_line(capsys, caplog, data, tmp_path):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(SystemExit):
        train_matcher.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in ("loss.mlm_weight", "model.text.width", "model.image.channels", "data.path"))
    assert train_matcher.main(["--data.path", str(data), "--run_dir", str(tmp_path), "--model.text.widht", "8"]) == 2
    assert "did you mean 'model.text.width'" in capsys.readouterr().err


# ---- retrieval ----

def test_ties_count_against_the_scorer():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert ranks(scores).tolist() == [0, 1, 2]
    found = retrieval_accuracy(scores)
    assert found == pytest.approx({"top1": 1 / 3, "top5": 1.0, "chance_top1": 1 / 3, "chance_top5": 1.0})
    assert retrieval_accuracy(torch.zeros(10, 10))["top1"] == 0


def test_captions_to_find_are_all_different(data):
    source = open_dataset(data)
    pairs = choose_pairs(source, seed=0)
    captions = [pair.caption.casefold() for pair in pairs]
    assert len(set(captions)) == len(captions) > 40
    assert all(pair.caption in source.captions(pair.row) for pair in pairs)
    assert pairs == choose_pairs(source, seed=0) != choose_pairs(source, seed=1)
    assert len(choose_pairs(source, seed=0, most=7)) == 7


# ---- starting a transformer from a matcher ----

def test_the_text_encoder_is_taken_over_whole(folder):
    model = tiny.seq2seq(encoder_layers=1, rotary="1d", dropout=0.1, text_vocab_size=tiny.text_tokenizer().vocab_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = take_text_encoder(model, folder)
    assert isinstance(source, TextTokenizer)
    assert source.model_proto == tiny.text_tokenizer().model_proto == matcher_text_source(folder).model_proto
    text = source.encode(["a red heart", "octopus"])
    with torch.no_grad():
        assert torch.equal(model.encode_text(*text), tiny.matcher().text_encoder(*text))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in before if name.startswith("text_encoder.")}


@pytest.mark.parametrize(("changes", "words"), [
    ({"width": 64}, r"width \(32 there, 64 here\)"),
    ({"encoder_layers": 2, "qk_norm": False}, r"qk_norm \(True there, False here\), encoder_layers \(1 there, 2 here\)"),
    ({"text_vocab_size": 321}, "text_vocab_size"), ({"text_length": 13}, "text_length"), ({"rotary": "none"}, "rotary")])
def test_another_text_encoder_is_refused_with_the_names_of_the_fields(folder, changes, words):
    model = tiny.seq2seq(**{"encoder_layers": 1, "text_vocab_size": tiny.text_tokenizer().vocab_size, **changes})
    before = model.state_dict()["text_encoder.text_input.embedding.weight"].clone()
    for refused in (lambda: take_text_encoder(model, folder), lambda: check_text_start(model.config, folder)):
        with pytest.raises(UserError, match=words) as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert torch.equal(model.state_dict()["text_encoder.text_input.embedding.weight"], before)


def test_a_model_without_a_text_encoder_cannot_start_from_one(folder):
    with pytest.raises(UserError, match="kind decoder_only has no text encoder"):
        take_text_encoder(tiny.decoder_only(), folder)
    with pytest.raises(MissingFileError, match="nowhere"):
        take_text_encoder(tiny.seq2seq(), "nowhere")
