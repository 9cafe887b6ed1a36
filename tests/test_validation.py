"""Measuring the held-out split while a run goes on, and keeping the best checkpoint: what is logged, kept and left alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from tokenloom_common.config import merge
from tokenloom_common.errors import UserError
from training import train_seq2seq
from training.config.matcher import MatcherRunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.data.builders.shapes import build_shapes
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.runs.retention import HIGHER_IS_BETTER, Measured
from training.train_matcher import MatcherTraining
from training.train_seq2seq import Seq2SeqTraining
from training.train_tokenizer import TokenizerTraining


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Token shards, and pictures."""
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder)
    build_shapes(folder / "pictures", size=16, num_scenes=40, seed=0)
    return folder


def config(made: Path, run_dir: Path, **changes: Any) -> Seq2SeqRunConfig:
    base = {"data": {"path": str(made / "tokens"), "validation_split": "held_out"}, "image_tokenizer": str(made / "tokenizer"),
            "run_dir": str(run_dir), "use_layout": False, "text": {"vocab_size": 300, "text_length": 12},
            "model": {"preset": "debug", "width": 32, "heads": 2, "head_dim": 16, "encoder_layers": 1, "decoder_layers": 1,
                      "dropout": 0.2},
            "train": {"steps": 6, "batch_size": 4, "precision": "float32", "log_every": 4, "sample_every": 0,
                      "validate_every": 2},
            "optim": {"lr": 0.01, "warmup_steps": 0, "schedule": "constant"}, "checkpoint": {"every_steps": 2}}
    return Seq2SeqRunConfig.parse(merge(base, changes), "test")


def train(run: Seq2SeqRunConfig, group: Processes) -> Seq2SeqTraining:
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


def measured(run_dir: Path, name: str = "validation_loss") -> dict[int, float]:
    """step -> held-out number."""
    return {row["step"]: row[name] for row in read_metrics(run_dir / "metrics.jsonl") if name in row}


def learned(run_dir: Path) -> list[tuple[int, str, str]]:
    """Every line of the training, to the bit."""
    return [(row["step"], row["loss"].hex(), row["grad_norm"].hex()) for row in read_metrics(run_dir / "metrics.jsonl")
            if "loss" in row]


# ---- what is logged, and what it leaves as it was ----

@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"train": {"weight_ema": 0.5}}, {"deepspeed": {"zero_stage": 3}}], ids=str)
def test_measuring_changes_nothing_of_the_training(made, tmp_path, group, changes):
    states = []
    for every in (0, 1):
        run = config(made, tmp_path / str(every), **merge({"train": {"validate_every": every}}, changes))
        states.append(train(run, group).engine.full_state())
    assert learned(tmp_path / "0") == learned(tmp_path / "1")
    assert [step for step, *_ in learned(tmp_path / "1")] == [1, 4, 6]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert measured(tmp_path / "0") == {}
    assert list(measured(tmp_path / "1")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
@pytest.mark.parametrize("work", ["validate", "save", "sample"])
def test_the_time_of_other_work_is_not_the_trainings(made, tmp_path, group, monkeypatch, work):
    """A clock that goes a second at each look, and a thousand while the work is done."""
    now = [0.0]
    monkeypatch.setattr("training.loop.window.time", SimpleNamespace(perf_counter=lambda: now.append(now[-1] + 1) or now[-1]))
    training = Seq2SeqTraining(config(made, tmp_path, train={"log_every": 1, "sample_every": 2}), group)
    task = training.task()
    owner = training.run_state if work == "save" else task
    real = getattr(owner, work)
    monkeypatch.setattr(owner, work, lambda *args: now.append(now[-1] + 1000) or real(*args))
    run_training(task, training.config, group, training.run_state)
    assert now[-1] > 3000
    assert all(row["samples_per_s"] >= 4 / 10 for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row)


@pytest.mark.long
def test_the_last_measurement_is_the_one_that_is_exported_and_is_not_made_again(made, tmp_path, group, monkeypatch):
    calls = []
    real = train_seq2seq.validation_loss
    monkeypatch.setattr(train_seq2seq, "validation_loss", lambda *args, **more: calls.append(1) or real(*args, **more))
    training = train(config(made, tmp_path, train={"steps": 5}), group)
    training.finish()
    assert list(measured(tmp_path)) == [2, 4, 5]
    assert len(calls) == 3
    assert json.loads((tmp_path / "validation.json").read_text())["loss"] == measured(tmp_path)[5]
    assert f" | {measured(tmp_path)[5]:.4f} |" in (tmp_path / "model/README.md").read_text()
    alone = real(training.full_model(), training.held_out, training.collate, 0)
    assert alone.loss == measured(tmp_path)[5]
    fresh = train(config(made, tmp_path / "fresh", train={"steps": 5, "validate_every": 0}), group)
    fresh.finish()
    assert json.loads((tmp_path / "fresh/validation.json").read_text())["loss"] == measured(tmp_path)[5]


@pytest.mark.long
def test_a_resumed_run_measures_the_same(made, tmp_path, group):
    train(config(made, tmp_path / "whole", model={"dropout": 0.2}), group)
    train(config(made, tmp_path / "parts", train={"steps": 5}), group)
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000005")  # killed after step 5: it goes on from 4
    train(config(made, tmp_path / "parts"), group)
    assert measured(tmp_path / "parts") == measured(tmp_path / "whole")
    assert list(measured(tmp_path / "whole")) == [2, 4, 6]


def pictures(made: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    return merge({"data": {"path": str(made / "pictures"), "validation_split": "unseen_combination"}, "run_dir": str(run_dir),
                  "train": {"steps": 3, "batch_size": 8, "precision": "float32", "log_every": 1, "sample_every": 3,
                            "validate_every": 2}, "checkpoint": {"every_steps": 0}}, more)


@pytest.mark.long
def test_a_tokenizer_measures_psnr(made, tmp_path, group):
    model = {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "norm_groups": 4,
             "attention_resolutions": [], "mid_attention": False, "z_channels": 8, "embed_dim": 4, "codebook_size": 16}
    run = TokenizerRunConfig.parse(pictures(made, tmp_path, model=model), "test")
    training = TokenizerTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    training.finish()
    found = measured(tmp_path, "validation_psnr")
    assert list(found) == [2, 3]
    assert found[2] != found[3] == json.loads((tmp_path / "validation.json").read_text())["psnr"]
    assert f"| held-out PSNR, dB, on `unseen_combination` | {found[3]:.4f} |" in (tmp_path / "model/README.md").read_text()
    assert (tmp_path / "codebook.png").is_file()  # lines of the held-out split have no codebook


@pytest.mark.long
def test_a_matcher_measures_how_many_captions_it_finds(made, tmp_path, group):
    run = MatcherRunConfig.parse(pictures(
        made, tmp_path, text={"vocab_size": 300, "text_length": 16}, model={
            "image": {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "norm_groups": 4},
            "text": {"width": 32, "heads": 2, "head_dim": 16, "layers": 1}, "embed_dim": 16}), "test")
    training = MatcherTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    training.finish()
    found = measured(tmp_path, "validation_top1")
    assert list(found) == [2, 3]
    assert found[3] == json.loads((tmp_path / "validation.json").read_text())["top1"]


# ---- the best ----

def keep_best(made: Path, run_dir: Path, group: Processes, monkeypatch: pytest.MonkeyPatch, losses: dict[int, float],
              **changes: Any) -> None:
    """Train with held-out losses that are given."""
    monkeypatch.setattr(Seq2SeqTraining, "validate", lambda self, step: Measured("validation_loss", losses[step]))
    train(config(made, run_dir, **merge({"checkpoint": {"keep_last": 1, "keep_best": True}}, changes)), group)


def kept(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.long
def test_the_best_checkpoint_outlives_the_last_ones_and_a_stop(made, tmp_path, group, monkeypatch):
    losses = {2: 3.0, 4: 2.0, 5: 2.5, 6: 2.5, 8: math.nan, 10: 2.0}
    keep_best(made, tmp_path, group, monkeypatch, losses, train={"steps": 6})
    assert kept(tmp_path) == [4, 6]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 4, "checkpoint": "checkpoints/step-00000004", "validation_loss": 2.0}
    keep_best(made, tmp_path, group, monkeypatch, losses, train={"steps": 8})
    manifests = {step: json.loads((tmp_path / f"checkpoints/step-{step:08d}/MANIFEST.json").read_text()) for step in (4, 8)}
    assert manifests[4]["measured"] == {"name": "validation_loss", "value": 2.0}
    assert "measured" not in manifests[8]  # JSON has no NaN
    keep_best(made, tmp_path, group, monkeypatch, losses, train={"steps": 10})
    assert kept(tmp_path) == [4, 10]  # an equal one and one that is no number are not better
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    keep_best(made, tmp_path, group, monkeypatch, losses | {12: 1.0}, train={"steps": 12})
    assert kept(tmp_path) == [12]
    assert json.loads((tmp_path / "best.json").read_text())["validation_loss"] == 1.0


def test_without_the_key_the_best_goes_like_any_other(made, tmp_path, group, monkeypatch):
    keep_best(made, tmp_path, group, monkeypatch, {2: 1.0, 4: 2.0, 6: 3.0}, checkpoint={"keep_best": False})
    assert kept(tmp_path) == [6]
    assert not (tmp_path / "best.json").exists()


@pytest.mark.long
def test_a_kept_best_can_be_gone_on_from(made, tmp_path, group):
    """It is a whole checkpoint like any other: a run folder that has it alone goes on from it, to the same weights."""
    training = train(config(made, tmp_path / "run", checkpoint={"keep_last": 1, "keep_best": True, "every_steps": 2}), group)
    best = json.loads((tmp_path / "run/best.json").read_text())
    assert best["step"] < 6
    assert best["validation_loss"] == min(measured(tmp_path / "run").values())
    assert best["step"] == min(measured(tmp_path / "run"), key=measured(tmp_path / "run").get)
    expected = training.engine.full_state()
    shutil.copytree(tmp_path / "run" / best["checkpoint"], tmp_path / "other" / best["checkpoint"])
    shutil.copytree(tmp_path / "run/text_tokenizer", tmp_path / "other/text_tokenizer")
    (tmp_path / "other/latest.json").write_text("{}")
    again = train(config(made, tmp_path / "other"), group)
    assert again.run_state.resume_from.name == Path(best["checkpoint"]).name
    assert all(torch.equal(value, again.engine.full_state()[name]) for name, value in expected.items())


@pytest.mark.parametrize("name", HIGHER_IS_BETTER)
def test_which_of_two_is_the_better_one(name):
    low, high = Measured(name, 1.0), Measured(name, 2.0)
    better, worse = (high, low) if HIGHER_IS_BETTER[name] else (low, high)
    assert better.better_than(worse)
    assert not worse.better_than(better)
    assert not better.better_than(better)
    assert worse.better_than(None)
    assert not Measured(name, math.inf if HIGHER_IS_BETTER[name] else -math.inf).better_than(worse)
    assert not Measured(name, math.nan).better_than(None)


# ---- what is refused ----

@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"validation_split": None}}, "train.validate_every 2 measures data.validation_split, and none is named"),
    ({"checkpoint": {"keep_best": True, "every_steps": 4}}, "train.validate_every, here 2, to be a multiple of "
     "checkpoint.every_steps, here 4"),
    ({"checkpoint": {"keep_best": True, "every_steps": 0}}, "checkpoint.every_steps, here 0"),
    ({"checkpoint": {"keep_best": True}, "train": {"validate_every": 0}}, "train.validate_every, here 0"),
    ({"train": {"validate_every": -1}}, "validate_every")])
def test_what_cannot_be_measured_or_kept_is_refused(made, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        config(made, tmp_path, **changes)
    assert "\n" not in str(caught.value)
