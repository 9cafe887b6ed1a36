"""Training an image tokenizer in this process: two engines, skipped steps, options that are refused."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tokenizer_runs import (
    ADVERSARIAL,
    VQ,
    assert_close,
    config,
    discriminator_state,
    make_data,
    train,
)
from tokenizer_image import ImageTokenizer, Reconstruction, tokenizer_loss
from tokenizer_image.adversarial import discriminator_objective, generator_loss, generator_weight
from tokenloom_common.errors import RunFailedError, UserError
from training.config.loading import load_config
from training.config.tokenizer import TokenizerRunConfig
from training.engine.optim import build_optimizer, lr_at
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.train_tokenizer import TokenizerTraining


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


# ---- two optimizers ----

def plain_training(run: TokenizerRunConfig, training: TokenizerTraining, model: ImageTokenizer, judge: nn.Module) -> None:
    """The same in PyTorch alone: tokenizer step, then discriminator step, on the batches that the training sees."""
    pairs = [(model, build_optimizer(model, run.optim), run.optim, 0),
             (judge, build_optimizer(judge, run.discriminator_optim), run.discriminator_optim, run.adversarial.start_step)]
    for step, batch in enumerate(training.batches(0)):
        for _, optimizer, optim, start in pairs:
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr_at(max(0, step - start), run.train.steps - start, optim)
        result = model(batch.image.contiguous(memory_format=torch.channels_last))
        loss = tokenizer_loss(result, batch.image, run.loss).total
        if step >= run.adversarial.start_step:
            deceived = generator_loss(judge(result.reconstruction), run.adversarial.loss)
            loss = loss + deceived * generator_weight(step, run.adversarial, loss, deceived, model.last_layer)
        _apply(*pairs[0][:3], loss)
        if step >= run.adversarial.start_step:
            judged = discriminator_objective(judge, batch.image, result.reconstruction.detach(), step, run.adversarial)
            _apply(*pairs[1][:3], judged.total)


def _apply(module: nn.Module, optimizer: torch.optim.Optimizer, optim: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=list(module.parameters()))
    nn.utils.clip_grad_norm_(module.parameters(), optim.gradient_clipping)
    optimizer.step()


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_engines_equal_a_plain_loop_with_two_optimizers(group, data, tmp_path, stage):
    run = config(data, tmp_path / "run", adversarial=ADVERSARIAL, deepspeed={"zero_stage": stage})
    training = TokenizerTraining(run, group)
    model, judge = copy.deepcopy(training.tokenizer), copy.deepcopy(training.adversary.engine.module)
    start = copy.deepcopy(judge.state_dict())
    plain_training(run, training, model, judge)
    run_training(training.task(), run, group, training.run_state)
    assert_close(training.engine.full_state(), model.state_dict(), 2e-5)
    assert_close(discriminator_state(training), judge.state_dict(), 2e-5)
    assert any(not torch.equal(start[name], value) for name, value in judge.state_dict().items())


def digest(module: nn.Module) -> str:
    """Of every weight, buffer and gradient."""
    parts = [*module.state_dict().values(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return hashlib.sha256(b"".join(part.detach().numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_generators_step_leaves_the_discriminator_as_it_is(group, data, tmp_path, stage, monkeypatch):
    run = config(data, tmp_path / "run", adversarial=ADVERSARIAL, deepspeed={"zero_stage": stage})
    training = TokenizerTraining(run, group)
    judge, seen = training.adversary.engine.module, []
    whole, judges = training.train, training.adversary.train

    def tokenizers_half(batch, step):
        seen.append([digest(judge)])
        return whole(batch, step)

    def judges_half(image, reconstruction, step):
        seen[-1].append(digest(judge))
        terms = judges(image, reconstruction, step)
        seen[-1].append(digest(judge))
        return terms

    monkeypatch.setattr(training, "train", tokenizers_half)
    monkeypatch.setattr(training.adversary, "train", judges_half)
    run_training(training.task(), run, group, training.run_state)
    assert len(seen) == run.train.steps
    assert all(before == between for before, between, _ in seen)
    assert sum(between != after for _, between, after in seen) == run.train.steps - run.adversarial.start_step


@pytest.mark.long
def test_accumulation_is_right_for_both_networks(group, data, tmp_path):
    """Without what depends on the micro-batch: adaptive weight and LeCAM (and FSQ learns nothing from a batch)."""
    states = []
    for accumulation in (1, 4):
        run = config(data, tmp_path / str(accumulation), adversarial={**ADVERSARIAL, "adaptive": False},
                     train={"accumulation": accumulation})
        training = train(run, group)
        states.append((training.engine.full_state(), discriminator_state(training)))
    for one, four in zip(*states, strict=True):
        assert_close(four, one, 2e-5)


def test_terms_are_logged_by_name_before_and_after_weighting(group, data, tmp_path):
    run = config(data, tmp_path / "run", adversarial={**ADVERSARIAL, "lecam_weight": 0.1, "warmin_steps": 2}, model=VQ,
                 loss={"l1_weight": 0.5, "l2_weight": 2.0})
    training = train(run, group)
    rows = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    assert {"generator", "discriminator", "lecam", "logits_real"}.isdisjoint(rows[0])  # it starts at the second step
    for row in rows:
        weighted = [row[f"weighted.{name}"] for name in ("l1", "l2", "commit", "generator") if f"weighted.{name}" in row]
        assert row["loss"] == pytest.approx(sum(weighted), rel=1e-5)
        assert row["weighted.l2"] == pytest.approx(2 * row["l2"], rel=1e-5)
    assert rows[1]["weighted.generator"] == pytest.approx(rows[1]["generator"] * rows[1]["generator_weight"], rel=1e-5)
    assert [("r1" in row) for row in rows] == [False, True, False, True]
    assert rows[1]["weighted.r1"] == pytest.approx(rows[1]["r1"] * 0.5 / 2 * 2, rel=1e-5)
    assert rows[1]["weighted.lecam"] == pytest.approx(0.1 * rows[1]["lecam"], rel=1e-5)
    assert rows[0]["discriminator.lr"] == 0.0
    assert rows[1]["discriminator.lr"] == pytest.approx(0.01)
    assert training.adversary.lecam.initialized


@pytest.mark.long
def test_resumed_adversarial_training_equals_uninterrupted_to_the_bit(group, data, tmp_path):
    """Both engines, LeCAM's averages, the average of the weights and the codebook's health are in the checkpoint."""
    changes = {"adversarial": {**ADVERSARIAL, "lecam_weight": 0.1}, "model": VQ, "train": {"weight_ema": 0.5, "steps": 6},
               "checkpoint": {"every_steps": 3, "keep_last": 5}}
    whole = train(config(data, tmp_path / "run", **changes), group)
    expected = [*whole.full_model().state_dict().values(), *discriminator_state(whole).values(), whole.adversary.lecam.ema_real]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    for path in (tmp_path / "run/checkpoints").glob("step-00000006"):
        path.rename(tmp_path / "later")
    again = train(config(data, tmp_path / "run", **changes), group)
    found = [*again.full_model().state_dict().values(), *discriminator_state(again).values(), again.adversary.lecam.ema_real]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    timing = {"samples_per_s", "data_wait", "elapsed_s", "memory_bytes"}
    strip = [{k: v for k, v in row.items() if k not in timing} for row in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert strip == [{k: v for k, v in row.items() if k not in timing} for row in rows]


# ---- what is not finite ----

def poison(monkeypatch, steps: set[int]) -> None:
    """Let the model's own term be NaN in the named calls (0 is the first)."""
    seen = iter(range(1000))
    plain = ImageTokenizer.forward

    def forward(self: ImageTokenizer, image: Tensor) -> Reconstruction:
        result = plain(self, image)
        if not self.training or image.is_meta or next(seen) not in steps:  # meta: the estimate's, before the first step
            return result
        bad = {name: part._replace(value=part.value * torch.nan) for name, part in result.losses.items()}
        return result._replace(losses=bad)

    monkeypatch.setattr(ImageTokenizer, "forward", forward)


@pytest.mark.long
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(group, data, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {2})
    run = config(data, tmp_path / "run", model=VQ, adversarial=ADVERSARIAL)
    train(run, group)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["commit"] is None
    assert "step 3 of the model is skipped: not finite: commit" in caplog.text
    assert all(torch.isfinite(value).all() for value in load_state(tmp_path / "run", group, run).values())


def load_state(run_dir: Path, group: Processes, run: TokenizerRunConfig) -> dict[str, Tensor]:
    training = TokenizerTraining(run, group)
    training.run_state.load(training.task(), training.run_state.resume_from)
    return training.engine.full_state()


@pytest.mark.long
def test_too_many_skipped_steps_end_the_run_with_a_whole_checkpoint(group, data, tmp_path, monkeypatch):
    run = config(data, tmp_path / "run", model=VQ, train={"steps": 50, "max_skipped_steps": 2})
    poison(monkeypatch, set(range(3, 60)))
    with pytest.raises(RunFailedError, match=r"3 steps were skipped .*checkpoint of step 6 saved") as caught:
        train(run, group)
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "run/latest.json").read_text())["step"] == 6
    assert all(torch.isfinite(value).all() for value in load_state(tmp_path / "run", group, run).values())


@pytest.mark.long
def test_after_a_stop_for_skipped_steps_the_count_goes_on_and_the_limit_starts_anew(group, data, tmp_path, monkeypatch):
    run = config(data, tmp_path / "run", model=VQ, train={"steps": 8, "max_skipped_steps": 2})
    with monkeypatch.context() as patched:
        poison(patched, set(range(3, 60)))
        with pytest.raises(RunFailedError):
            train(run, group)
    poison(monkeypatch, {1})
    train(run, group)
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 0, 0, 1, 2, 3, 3, 4]


# ---- configs ----

@pytest.mark.parametrize(("argv", "words"), [
    (["--model.kind", "vqgna"], "did you mean 'vqgan'"), (["--model.preset", "vq16"], "did you mean 'vq-16'"),
    (["--model.quantizer.kind", "fsq"], "needs levels"), (["--model.quantizer.depth", "3"], "does not read depth"),
    (["--deepspeed.zero_stage", "3"], "use 0, 1 or 2"), (["--train.trained_part", "decoder"], "needs init_from"),
    (["--adversarial.weight", "1", "--adversarial.start_step", "1000"], "not before the end"),
    (["--adversarial.weight", "1", "--adversarial.head_start_steps", "5000"], "not before the end"),
    (["--loss.l1_weight", "0"], "nothing to learn"), (["--adversarial.lecam_weight", "1"], "no effect without"),
    (["--model.patch_size", "8"], "unknown key 'model.patch_size'"), (["--codebook.warn_below", "2"], "codebook.warn_below")])
def test_wrong_options_are_one_line(argv, words):
    with pytest.raises(UserError, match=words) as caught:
        load_config(TokenizerRunConfig, ["--data.path", "d", "--run_dir", "r", *argv], "train_tokenizer.py", "")
    assert "\n" not in str(caught.value)


def test_a_preset_can_be_changed_and_a_kind_replaces_its_section(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {preset: vq-16, resolution: 128, attention_resolutions: [8], "
                      "quantizer: {commitment_weight: 0.5}}\n")

    def load(*argv: str) -> TokenizerRunConfig:
        return load_config(TokenizerRunConfig, ["--config", str(recipe), "--data.path", "d", "--run_dir", "r", *argv], "t", "")

    changed = load("--model.codebook_size", "512").model
    assert (changed.resolution, changed.codebook_size, changed.quantizer.commitment_weight) == (128, 512, 0.5)
    assert changed.quantizer.learn_codebook_by_gradient  # of the preset
    assert load("--model.kind", "vit_vqgan").model.resolution == 256
    assert load("--model.preset", "vq-8").model.resolution == 256
    sizes = ["--model.embed_dim", "3", "--model.codebook_size", "60"]
    fsq = load("--model.quantizer.kind", "fsq", "--model.quantizer.levels", "[5, 4, 3]", *sizes).model
    assert fsq.quantizer.levels == (5, 4, 3)
    recipe.write_text("model: {resolution: 64, quantizer: {ema_decay: 0.9}}\n")
    assert load("--model.kind", "vqgan", "--model.quantizer.kind", "vq").model.quantizer.ema_decay == 0.9
    assert load("--model.kind", "vqgan").model.resolution == 64  # it was one already
    assert load("--model.codebook_size", "512", "--model.preset", "vq-16").model.codebook_size == 512  # in any order
    assert load("--adversarial.discriminator.channels", "32", "--adversarial.discriminator.kind", "patchgan"
                ).adversarial.discriminator.channels == 32
