"""Training the transformer in this process: families, text inputs, layouts, losses, weight average; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from inference import SamplingParams, TextToImage
from seq2seq import DecoderOnly
from seq2seq.losses import token_loss
from tests import tiny
from tokenloom_common.config import merge
from tokenloom_common.errors import ResumeError, UserError
from training.config.seq2seq import Seq2SeqRunConfig
from training.data.visits.order import ItemId
from training.engine.gpus import training_flops
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.planning.flops import forward_flops
from training.runs.incidents import read_incidents
from training.runs.metrics import read_metrics
from training.train_seq2seq import Seq2SeqTraining

ROWS, LAYOUT_GRID = 12, (2, 2)
SMALL = {"width": 32, "heads": 2, "head_dim": 16}
ENCODER_DECODER = {"preset": "debug", **SMALL}
DECODER_ONLY = {"preset": "debug-decoder", **SMALL}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An image tokenizer, token shards of it with layouts, and a frozen text encoder's folder."""
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, ROWS, LAYOUT_GRID)
    tiny.bert_folder(folder / "bert")
    return folder


def config(made: Path, run_dir: Path, **changes: Any) -> Seq2SeqRunConfig:
    base = {"data": {"path": str(made / "tokens"), "validation_split": "held_out"}, "image_tokenizer": str(made / "tokenizer"),
            "run_dir": str(run_dir), "model": ENCODER_DECODER, "use_layout": False,
            "text": {"vocab_size": 300, "text_length": 12},
            "train": {"steps": 3, "batch_size": 6, "precision": "float32", "log_every": 1, "sample_every": 0},
            "optim": {"lr": 0.003, "warmup_steps": 0}, "checkpoint": {"every_steps": 0},
            "sample_guidance": 2.5, "sample_temperature": 0.9, "sample_top_k": 20}
    for name in ("text", "model"):
        if name in changes:
            base[name] = {}
    return Seq2SeqRunConfig.parse(merge(base, changes), "test")


def train(run: Seq2SeqRunConfig, group: Processes) -> Seq2SeqTraining:
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


VARIANTS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {},
    "decoder-only": {"model": DECODER_ONLY},
    "dalle": {"model": {**DECODER_ONLY, "predict_text": True, "text_padding": "learned", "begin_of_image": False,
                        "attention": ["row", "column"], "last_attention": "convolution"},
              "loss": {"image_weight": 0.875, "text_weight": 0.125}},
    "classes": {"model": DECODER_ONLY, "text": {"kind": "classes"}},
    "frozen": {"text": {"kind": "frozen", "encoder": "{made}/bert", "text_length": 8}},
    "frozen, cached": {"model": DECODER_ONLY, "text": {"kind": "frozen", "encoder": "{made}/bert", "text_length": 8,
                                                       "feature_cache": "{run}/features"}},
    "layout": {"use_layout": True, "loss": {"region_weights": {"3": 4.0}, "layout_weight": 0.5}},
    "layout, decoder-only": {"use_layout": True, "model": DECODER_ONLY},
    "smoothed": {"loss": {"label_smoothing": 0.1, "z_weight": 1e-3}, "token_corruption": 0.2, "train": {"weight_ema": 0.5}},
    "tables from the codebook": {"code_tables_from_codebook": True},
}


def variant(name: str, made: Path, run_dir: Path) -> Seq2SeqRunConfig:
    text = json.dumps(VARIANTS[name]).replace("{made}", str(made)).replace("{run}", str(run_dir))
    return config(made, run_dir, **json.loads(text))


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_exports_and_samples(name, made, tmp_path, group):
    run = variant(name, made, tmp_path / "run")
    training = train(run, group)
    training.finish()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    parts = [key for key in ("image", "text", "layout", "z") if key in rows[0]]
    expected = {"dalle": ["image", "text"], "layout": ["image", "layout"], "layout, decoder-only": ["image", "layout"],
                "smoothed": ["image", "z"]}
    assert parts == expected.get(name, [])
    held_out = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert len(held_out["loss_by_position"]) == 16
    assert numpy.mean(held_out["loss_by_position"]) == pytest.approx(held_out["loss"], abs=1e-4)
    assert held_out["perplexity"] == pytest.approx(numpy.exp(held_out["loss"]))
    assert (tmp_path / "run" / "positions.png").stat().st_size > 1000
    model = TextToImage.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert model.default_params == SamplingParams(guidance_scale=2.5, temperature=0.9, top_k=20)
    result = model.generate(tiny.CAPTIONS[0], num_images=2, params=SamplingParams(guidance_scale=2.0))
    assert result.image_tokens.shape == (2, 16)
    assert (result.layouts is not None) == run.use_layout
    assert torch.equal(model.generate(tiny.CAPTIONS[0], params=SamplingParams(guidance_scale=2.0)).image_tokens[0],
                       result.image_tokens[0])


@pytest.mark.parametrize("name", ["dalle", "layout"])
def test_the_loss_is_the_weighted_sum_of_its_parts(name, made, tmp_path, group):
    run = variant(name, made, tmp_path / "run")
    training = Seq2SeqTraining(run, group)
    batch = training.collate(training.visits.__getitems__([ItemId(0, row) for row in range(6)]))
    model = training.full_model()
    layout = batch.layout if run.use_layout else None
    with torch.no_grad():
        logits = model(*batch.text, batch.input_tokens, layout)
    logged = training.train(batch, 0)
    if name == "dalle":
        assert isinstance(model, DecoderOnly)
        text = token_loss(logits.text, model.text_targets(*batch.text))
        expected = 0.875 * token_loss(logits.image, batch.image_tokens) + 0.125 * text
    else:
        weights = torch.where(batch.layout.reshape(6, 2, 2) == 3, 4.0, 1.0)
        weights = weights.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)
        expected = token_loss(logits.image, batch.image_tokens, weights) + 0.5 * token_loss(logits.layout, layout)
    assert float(logged["loss"]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.long
def test_the_weight_average_is_exported_and_survives_a_stop(made, tmp_path, group):
    whole = train(config(made, tmp_path / "whole", train={"weight_ema": 0.5, "steps": 4}), group)
    state, live = whole.full_model().state_dict(), whole.engine.full_state()
    assert any(not torch.equal(state[name], live[name].float()) for name in state)
    half = {"train": {"weight_ema": 0.5, "steps": 4}, "checkpoint": {"every_steps": 2}, "optim": {"schedule": "constant"}}
    uninterrupted = train(config(made, tmp_path / "a", **half), group).full_model().state_dict()
    train(config(made, tmp_path / "b", **merge(half, {"train": {"steps": 2}})), group)
    resumed = train(config(made, tmp_path / "b", **half), group).full_model().state_dict()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in resumed)


@pytest.mark.long
def test_a_run_is_not_continued_as_another_family(made, tmp_path, group):
    train(config(made, tmp_path / "run"), group)
    with pytest.raises(ResumeError, match="model"):
        Seq2SeqTraining(config(made, tmp_path / "run", model=DECODER_ONLY, train={"steps": 5}), group)
    with pytest.raises(ResumeError, match=r"optim\.name"):
        adafactor = {"name": "adafactor", "betas": [0.9, 0.96]}
        Seq2SeqTraining(config(made, tmp_path / "run", optim=adafactor, deepspeed={"zero_stage": 0}), group)


@pytest.mark.long
def test_cached_features_give_the_same_first_loss(made, tmp_path, group):
    text = {"kind": "frozen", "encoder": str(made / "bert"), "text_length": 8}
    losses = []
    for name, more in (("live", {}), ("kept", {"feature_cache": str(tmp_path / "features")})):
        train(config(made, tmp_path / name, text={**text, **more}, train={"steps": 1}), group)
        losses.append(read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {**DECODER_ONLY, "predict_text": True}}, "loss.text_weight is 0"),
    ({"loss": {"text_weight": 0.1}}, "model.predict_text is false"),
    ({"model": {**DECODER_ONLY, "predict_text": True}, "loss": {"text_weight": 0.1}, "text": {"kind": "classes"}},
     "text.kind classes"),
    ({"model": {"preset": "parti-350"}}, "did you mean 'parti-350m'"),
    ({"model": {"preset": "debug", "kind": "decoder_only"}}, "leave model.kind out"),
    ({"model": {"kind": "decoder"}}, "did you mean 'decoder_only'"),
    ({"model": {"preset": "debug-decoder", "encoder_layers": 2}}, "encoder_layers"),
    ({"model": {**DECODER_ONLY, "attention": ["rows"]}}, "did you mean 'row'"),
    ({"text": {"kind": "frozen"}}, "text.encoder"),
    ({"text": {"encoder": "x"}}, "text.encoder"),
    ({"text": {"feature_cache": "x"}}, "text.feature_cache is for text.kind frozen"),
    ({"text": {"padding": "left"}}, "text.padding left is for text.kind frozen, not sentencepiece"),
    ({"text": {"kind": "classes", "text_length": 9}}, "leave text.vocab_size and text.text_length out"),
    ({"text": {"kind": "frozen", "encoder": "x"}, "data": {"workers": 1}}, "data.workers cannot share a text encoder"),
    ({"train": {"weight_ema": 0.9}, "deepspeed": {"zero_stage": 3}}, "zero_stage 3"),
    ({"loss": {"label_smoothing": 1.0}}, "label_smoothing")])
def test_impossible_options_are_refused_before_anything_is_read(changes, words, made, tmp_path):
    with pytest.raises(UserError, match=words):
        config(made, tmp_path / "run", **changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"loss": {"region_weights": {"3": 2.0}}}, "this run has none"),
    ({"use_layout": True, "loss": {"region_weights": {"27": 2.0}}}, "layout class 27; the layout has 0 to 26"),
    ({"text": {"kind": "frozen", "encoder": "nowhere"}}, "nowhere"),
    ({"text": {"tokenizer": "nowhere"}}, "nowhere")])
def test_what_does_not_fit_the_data_is_refused(changes, words, made, tmp_path, group):
    with pytest.raises(UserError, match=words):
        Seq2SeqTraining(config(made, tmp_path / "run", **changes), group)
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


# ---- starting from a matcher's text encoder ----

@pytest.mark.long
def test_a_run_starts_from_a_matchers_text_encoder_and_its_vocabulary(made, tmp_path, group):
    matcher = tiny.matcher_folder(tmp_path / "matcher")
    start = {"text": {"start_from": str(matcher)}, "model": {**ENCODER_DECODER, "encoder_layers": 1}}
    training = Seq2SeqTraining(config(made, tmp_path / "run", **start), group)
    taken = tiny.matcher().text_encoder.state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in training.model.text_encoder.state_dict().items())
    assert training.text_source.model_proto == tiny.text_tokenizer().model_proto
    run_training(training.task(), training.config, group, training.run_state)
    after = training.model.text_encoder.state_dict()
    assert not all(torch.equal(value, taken[name]) for name, value in after.items())  # it is trained on
    (matcher / "matcher_index.json").unlink()  # a run that is continued no longer needs the matcher
    longer = config(made, tmp_path / "run", **merge(start, {"train": {"steps": 4}}))
    again = Seq2SeqTraining(longer, group)
    assert run_training(again.task(), longer, group, again.run_state)


@pytest.mark.long
@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {**ENCODER_DECODER, "encoder_layers": 2}}, r"encoder_layers \(1 there, 2 here\)"),
    ({"model": DECODER_ONLY}, "kind decoder_only has no text encoder")])
def test_a_text_encoder_that_does_not_fit_is_refused_before_anything_is_written(made, tmp_path, group, changes, words):
    matcher = tiny.matcher_folder(tmp_path / "matcher")
    with pytest.raises(UserError, match=words):
        Seq2SeqTraining(config(made, tmp_path / "run", text={"start_from": str(matcher)}, **changes), group)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [{"kind": "classes"}, {"vocab_size": 300}, {"tokenizer": "t"}, {"text_length": 9}])
def test_start_from_brings_its_own_text_tokenizer(made, tmp_path, text):
    with pytest.raises(UserError, match=r"text\.start_from .*leave"):
        config(made, tmp_path / "run", text={"start_from": "m", **text})


def test_a_skipped_step_and_a_spike_are_noted_with_the_keys_of_their_rows(made, tmp_path, group, monkeypatch):
    monkeypatch.setattr("training.runs.incidents.LEAST", 2)
    run = config(made, tmp_path / "run", train={"steps": 5, "max_skipped_steps": 3}, optim={"lr": 1e-5, "warmup_steps": 0})
    training = Seq2SeqTraining(run, group)
    task = training.task()
    real, factor = task.train, {1: float("nan"), 4: 3.0}

    def broken(batch, step):
        backward = training.engine.backward
        monkeypatch.setattr(training.engine, "backward", lambda loss, *rest: backward(loss * factor.get(step, 1.0), *rest))
        terms = real(batch, step)
        monkeypatch.setattr(training.engine, "backward", backward)
        return terms | {"loss": terms["loss"] * factor.get(step, 1.0)}

    task.train = broken
    run_training(task, run, group, training.run_state)
    skipped, spike = read_incidents(tmp_path / "run")
    assert (skipped["step"], skipped["what"], spike["step"], spike["what"]) == (2, "skipped", 5, "spike")
    for line in (skipped, spike):
        assert len(line["keys"]) == 6
        assert set(line["keys"]) <= {f"k{row}" for row in range(ROWS)}
    assert len(set(skipped["keys"]) | set(spike["keys"])) > 6


# ---- speed ----

@pytest.mark.long
def test_a_line_says_tokens_a_second_memory_and_mfu_where_the_peak_is_known(made, tmp_path, group, monkeypatch):
    asked = []
    for name, peak in (("cpu", None), ("gpu", 1e9)):
        monkeypatch.setattr("training.loop.loop.peak_flops", lambda *device, peak=peak: asked.append(device) or peak)
        training = train(config(made, tmp_path / name, train={"steps": 2}), group)
        for row in read_metrics(tmp_path / name / "metrics.jsonl"):
            assert row["tokens_per_s"] == pytest.approx(16 * row["samples_per_s"])
            assert row["memory_bytes"] > 50 << 20
            assert ("mfu" in row) == (peak is not None)
            if peak:
                work = training_flops(forward_flops(training.model.config))
                assert row["mfu"] == pytest.approx(work * row["samples_per_s"] / peak)
    assert asked == [("cpu", "float32")] * 2
