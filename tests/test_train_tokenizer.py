"""Training an image tokenizer in this process: two engines, frozen codes, skipped steps, weight average, health."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenizer_image import ImageTokenizer, Reconstruction, load_tokenizer, tokenizer_loss
from tokenizer_image.adversarial import discriminator_objective, generator_loss, generator_weight
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.config import dotted_names, merge
from tokenloom_common.errors import ResumeError, RunFailedError, UserError
from training.config.loading import load_config
from training.config.tokenizer import TokenizerRunConfig
from training.data.builders.shapes import build_shapes
from training.engine.optim import build_optimizer, lr_at
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.train_tokenizer import TokenizerTraining

MODEL = {"resolution": 16, "channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "norm_groups": 4,
         "attention_resolutions": [], "mid_attention": False, "z_channels": 8, "embed_dim": 3, "codebook_size": 60,
         "quantizer": {"kind": "fsq", "levels": [5, 4, 3]}}
VQ = {"embed_dim": 4, "codebook_size": 16, "quantizer": {"kind": "vq", "ema_decay": 0.9}}
ADVERSARIAL = {"weight": 0.3, "start_step": 1, "r1_weight": 0.5, "r1_every": 2,
               "discriminator": {"channels": 8, "layers": 1, "norm": "group"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    build_shapes(folder, size=16, num_scenes=40, seed=0)
    return folder


def config(data: Path, run_dir: Path, **changes: Any) -> TokenizerRunConfig:
    base = {"data": {"path": str(data)}, "run_dir": str(run_dir), "model": MODEL,
            "train": {"steps": 4, "batch_size": 8, "precision": "float32", "log_every": 1, "sample_every": 0},
            "optim": {"lr": 0.01, "warmup_steps": 2, "weight_decay": 0.1},
            "discriminator_optim": {"lr": 0.01, "gradient_clipping": 0.5},
            "checkpoint": {"every_steps": 0}}
    return TokenizerRunConfig.parse(merge(base, changes), "test")


def train(run: TokenizerRunConfig, group: Processes) -> TokenizerTraining:
    training = TokenizerTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


def discriminator_state(training: TokenizerTraining) -> dict[str, Tensor]:
    return training.adversary.engine.full_state()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


def test_too_many_skipped_steps_end_the_run_with_a_whole_checkpoint(group, data, tmp_path, monkeypatch):
    run = config(data, tmp_path / "run", model=VQ, train={"steps": 50, "max_skipped_steps": 2})
    poison(monkeypatch, set(range(3, 60)))
    with pytest.raises(RunFailedError, match=r"3 steps were skipped .*checkpoint of step 6 saved") as caught:
        train(run, group)
    assert caught.value.exit_code == 1
    assert json.loads((tmp_path / "run/latest.json").read_text())["step"] == 6
    assert all(torch.isfinite(value).all() for value in load_state(tmp_path / "run", group, run).values())


def test_after_a_stop_for_skipped_steps_the_count_goes_on_and_the_limit_starts_anew(group, data, tmp_path, monkeypatch):
    run = config(data, tmp_path / "run", model=VQ, train={"steps": 8, "max_skipped_steps": 2})
    with monkeypatch.context() as patched:
        poison(patched, set(range(3, 60)))
        with pytest.raises(RunFailedError):
            train(run, group)
    poison(monkeypatch, {1})
    train(run, group)
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [0, 0, 0, 1, 2, 3, 3, 4]


# ---- the decoder against frozen codes ----

@pytest.fixture(scope="module")
def trained(group, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training = train(config(data, folder / "run", model=VQ), group)
    training.finish()
    return folder / "run/model"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("decoder", [{}, {"decoder_channels": 16, "decoder_res_blocks": 2}], ids=["same", "larger"])
def test_decoder_fine_tuning_leaves_codes_bit_identical(group, data, tmp_path, trained, precision, decoder):
    before = load_tokenizer(trained)
    run = TokenizerRunConfig.parse({
        "data": {"path": str(data)}, "run_dir": str(tmp_path / "run"), "init_from": str(trained), "model": decoder,
        "adversarial": ADVERSARIAL, "train": {"steps": 3, "batch_size": 8, "precision": precision, "sample_every": 0,
                                              "trained_part": "decoder", "weight_ema": 0.9},
        "optim": {"lr": 0.01, "weight_decay": 0.1}}, "test")
    training = train(run, group)
    training.finish()
    after = load_tokenizer(tmp_path / "run/model")
    assert code_fingerprint(after) == code_fingerprint(before)
    kept = [name for name in before.state_dict() if name.startswith(("encoder.", "quant_conv.", "quantizer."))]
    assert len(kept) > 20
    assert all(torch.equal(before.state_dict()[name], after.state_dict()[name]) for name in kept)
    assert any(not torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items()
               if name.startswith("decoder.") and value.shape == after.state_dict()[name].shape)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(before.encode(picture), after.encode(picture))
    assert not torch.equal(before.decode(before.encode(picture)), after.decode(before.encode(picture)))


def test_starting_from_a_tokenizer_takes_all_its_weights(group, data, tmp_path, trained):
    run = config(data, tmp_path / "run", model=VQ, init_from=str(trained))
    training = TokenizerTraining(run, group)
    assert_close(training.engine.full_state(), load_tokenizer(trained).state_dict(), 0)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model": {**VQ, "channels": 16}, "init_from": "TRAINED"}, "tensors differ: .*leave model"),
    ({"model": {**VQ, "norm_groups": 2}, "init_from": "TRAINED", "train": {"trained_part": "decoder"}}, "other settings"),
    ({"model": {"embed_dim": 8, **{k: v for k, v in VQ.items() if k != "embed_dim"}}, "init_from": "TRAINED",
      "train": {"trained_part": "decoder"}}, "tensors differ"),
    ({"init_from": "nowhere"}, "init_from nowhere: no such model folder")])
def test_a_start_that_does_not_fit_is_refused(group, data, tmp_path, trained, changes, words):
    changes["init_from"] = changes["init_from"].replace("TRAINED", str(trained))
    with pytest.raises(UserError, match=words) as caught:
        TokenizerTraining(config(data, tmp_path / "run", **changes), group)
    assert "\n" not in str(caught.value)


# ---- average of the weights, learned codebook, checkpointing ----

def test_the_average_of_the_weights_is_what_is_exported(group, data, tmp_path):
    states = []

    class Watched(TokenizerTraining):
        def train(self, batch, step):
            terms = super().train(batch, step)
            states.append({name: value.clone() for name, value in self.tokenizer.state_dict().items()})
            return terms

    run = config(data, tmp_path / "run", train={"weight_ema": 0.9})
    training = Watched(run, group)
    run_training(training.task(), run, group, training.run_state)
    average = states[0]["decoder.conv_out.weight"]
    for state in states[1:]:
        average = 0.9 * average + 0.1 * state["decoder.conv_out.weight"]
    training.finish()
    torch.testing.assert_close(load_tokenizer(tmp_path / "run/model").decoder.conv_out.weight, average)
    assert not torch.equal(average, states[-1]["decoder.conv_out.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_kmeans_of_a_learned_codebook_outlives_the_first_step(group, data, tmp_path, stage):
    quantizer = {"kind": "vq", "learn_codebook_by_gradient": True, "l2_normalize": False, "dead_code_fraction": 0.0}
    run = config(data, tmp_path / "run", model={**VQ, "quantizer": quantizer}, deepspeed={"zero_stage": stage},
                 train={"steps": 1}, optim={"lr": 1e-6})
    codebook = train(run, group).full_model().codebook
    assert codebook.square().sum(dim=1).min() > 1e-4  # without take_over the zeros that it was built with come back
    assert codebook.unique(dim=0).shape[0] > 8


def test_gradient_checkpointing_trains_to_the_same_weights(group, data, tmp_path):
    states = []
    for on in (False, True):
        training = train(config(data, tmp_path / str(on), train={"gradient_checkpointing": on}), group)
        assert training.tokenizer.gradient_checkpointing is on
        states.append(training.engine.full_state())
    assert_close(states[1], states[0], 1e-6)


def test_the_average_leaves_frozen_weights_as_they_are(group, data, tmp_path, trained):
    """decay x a + (1 - decay) x a is not a in float32: in ten thousand steps the codes would be others."""
    run = config(data, tmp_path / "run", model=VQ, init_from=str(trained),
                 train={"trained_part": "decoder", "weight_ema": 0.999})
    training = TokenizerTraining(run, group)
    for _ in range(50):
        training.average.update_parameters(training.tokenizer)
    expected = load_tokenizer(trained).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in training.average.module.state_dict().items())


@pytest.mark.parametrize(("then", "now", "words"), [
    ({}, {"adversarial": ADVERSARIAL}, "discriminator.* then"),
    ({}, {"train": {"weight_ema": 0.9}}, "weight_ema None then, True now"),
    ({}, {"codebook": {"window": 8}}, "codebook.window 0 then, 8 now"),
    ({}, {"train": {"precision": "bfloat16"}}, "precision float32"),
    ({"adversarial": ADVERSARIAL}, {"adversarial": {**ADVERSARIAL, "discriminator": {"channels": 4, "layers": 1}}},
     "channels 8 then")])
def test_a_checkpoint_of_another_kind_of_training_is_refused_with_exit_code_3(group, data, tmp_path, then, now, words):
    train(config(data, tmp_path / "run", **then, train={"steps": 2}), group)
    with pytest.raises(ResumeError, match=words):
        TokenizerTraining(config(data, tmp_path / "run", **{**now, "train": {"steps": 4, **now.get("train", {})}}), group)


def test_an_adversarial_phase_can_be_turned_off_from_a_checkpoint_on(group, data, tmp_path):
    train(config(data, tmp_path / "run", adversarial=ADVERSARIAL, train={"steps": 2}), group)
    training = train(config(data, tmp_path / "run", train={"steps": 4}), group)
    assert training.adversary is None
    assert "generator" not in read_metrics(tmp_path / "run/metrics.jsonl")[-1]


def test_a_refused_start_leaves_an_earlier_run_where_it_is(group, data, tmp_path):
    train(config(data, tmp_path / "run"), group)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    wrong = {"adversarial": {**ADVERSARIAL, "discriminator": {"layers": 7}}, "checkpoint": {"resume": "never"}}
    with pytest.raises(UserError, match="layers"):
        TokenizerTraining(config(data, tmp_path / "run", **wrong), group)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("kind", ["vit_vqgan", "dvae"])
def test_every_family_trains(group, data, tmp_path, kind):
    sizes = {"vit_vqgan": {"patch_size": 4, "embed_dim": 4, "codebook_size": 16, **{
        f"{side}_{name}": value for side in ("encoder", "decoder")
        for name, value in (("width", 16), ("layers", 1), ("heads", 2), ("mlp", 32))}},
        "dvae": {"width": 8, "groups": 2, "blocks_per_group": 1, "embed_dim": 8, "codebook_size": 16}}[kind]
    run = config(data, tmp_path / "run", model={"kind": kind, "resolution": 16, **sizes}, train={"steps": 3})
    training = train(run, group)
    training.finish()
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert all(row["loss"] is not None for row in rows)
    assert load_tokenizer(tmp_path / "run/model").kind == kind
    if kind == "dvae":
        assert rows[0]["temperature"] > rows[-1]["temperature"]
        assert rows[0]["weighted.logit_laplace"] == pytest.approx(rows[0]["logit_laplace"])


# ---- health ----

def test_a_poor_codebook_is_warned_of_once_in_words_with_options_that_exist(group, data, tmp_path, caplog):
    quantizer = {"kind": "vq", "l2_normalize": False, "kmeans_init": False, "dead_code_fraction": 0.0}
    run = config(data, tmp_path / "run", model={"embed_dim": 64, "codebook_size": 64, "quantizer": quantizer},
                 train={"steps": 6}, codebook={"warn_below": 1.0})
    with caplog.at_level(logging.WARNING):
        train(run, group)
    warnings = [record.getMessage() for record in caplog.records if "codes are in use" in record.getMessage()]
    assert len(warnings) == 1
    options = re.findall(r"--([\w.]+)", warnings[0])
    assert {"model.quantizer.l2_normalize", "model.embed_dim", "model.quantizer.dead_code_fraction"} <= set(options)
    assert set(options) <= set(dotted_names(TokenizerRunConfig))
    row = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert row["dead_codes"] == round(64 * (1 - row["codebook_usage"])) > 0


def test_a_gumbel_tokenizer_cools_down_and_is_warned_of_in_its_own_options(group, data, tmp_path, caplog):
    quantizer = {"kind": "gumbel", "kl_weight": 0.01, "temperature_steps": 4}
    run = config(data, tmp_path / "run", model={"embed_dim": 4, "codebook_size": 64, "quantizer": quantizer},
                 train={"steps": 6}, codebook={"warn_below": 1.0})
    with caplog.at_level(logging.WARNING):
        training = train(run, group)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    temperatures = [row["temperature"] for row in rows]
    assert temperatures == sorted(temperatures, reverse=True)
    assert (temperatures[0], temperatures[-1]) == (1.0, 1 / 16)
    assert rows[0]["weighted.kl"] == pytest.approx(0.01 * rows[0]["kl"])
    (warning,) = [record.getMessage() for record in caplog.records if "codes are in use" in record.getMessage()]
    assert "--model.quantizer.kl_weight 0.1;" in warning
    assert set(re.findall(r"--([\w.]+)", warning)) <= set(dotted_names(TokenizerRunConfig))
    raw = {"kind": "vq", "learn_codebook_by_gradient": True, "raw_search": True, "kmeans_init": False,
           "dead_code_fraction": 0.0}
    training.health.config = config(data, tmp_path / "run", model={**VQ, "quantizer": raw})
    assert not re.search("kmeans|dead_code", " ".join(training.health._remedies()))


def test_a_healthy_codebook_is_not_warned_of(group, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(config(data, tmp_path / "run", model=VQ, train={"steps": 6}), group)
    assert "codes are in use" not in caplog.text


def test_restarts_are_counted_and_plots_are_drawn(group, data, tmp_path):
    quantizer = {"kind": "vq", "dead_code_fraction": 0.9, "ema_decay": 0.5}
    run = config(data, tmp_path / "run", model={**VQ, "quantizer": quantizer}, train={"steps": 4, "sample_every": 4})
    train(run, group)
    assert sum(row["restarted_codes"] for row in read_metrics(tmp_path / "run/metrics.jsonl")) > 0
    assert {"curves.png", "codebook.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_the_window_of_the_health_is_an_epoch_or_as_long_as_it_is_told(group, data, tmp_path):
    for window, pictures in ((0, 24), (16, 16)):
        run = config(data, tmp_path / str(window), model=VQ, codebook={"window": window}, train={"steps": 12})
        training = train(run, group)
        epoch = len(training.visits)
        per_picture = training.tokenizer.num_tokens
        seen = int(training.health.counts().sum()) // per_picture
        expected = epoch if window == 0 else pictures
        assert abs(seen - expected) <= 8, (seen, expected)


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


