"""Frozen codes, starts from a trained tokenizer, weight average, checkpointing, families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tokenizer_runs import ADVERSARIAL, VQ, assert_close, config, make_data, train
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import ResumeError, UserError
from training.config.tokenizer import TokenizerRunConfig
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.train_tokenizer import TokenizerTraining


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


# ---- the decoder against frozen codes ----

@pytest.fixture(scope="module")
def trained(group, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training = train(config(data, folder / "run", model=VQ), group)
    training.finish()
    return folder / "run/model"


@pytest.mark.long
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


@pytest.mark.long
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

@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
