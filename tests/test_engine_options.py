"""Options of the engine: what cannot work is refused, and DeepSpeed's JSON and precision follow from ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import tiny
from tests.small_engine import config, small, with_deepspeed
from tokenloom_common.errors import UserError
from training.config.optim import OptimConfig
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import resolve_precision
from training.engine.optim import build_optimizer


@pytest.mark.parametrize(("train_options", "stage", "words"), [
    ({"precision": "float16"}, 0, "float16 with deepspeed.zero_stage 0"), ({"compile": True}, 3, "train.compile with")])
def test_combinations_that_do_not_work_are_refused(train_options, stage, words):
    with pytest.raises(UserError, match=words):
        with_deepspeed(stage, train=train_options)


def test_float16_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(UserError, match="no instructions for it; use float32"):
        resolve_precision(with_deepspeed(1, train={"precision": "float16"}), torch.device("cpu"))


def test_deepspeeds_json_follows_from_ours():
    run = config(2, batch_size=48, accumulation=3)
    derived = deepspeed_json(run, world_size=4, precision="bfloat16", parameters=1000)
    assert (derived["train_batch_size"], derived["gradient_accumulation_steps"], derived["train_micro_batch_size_per_gpu"]) == (
        48, 3, 4)
    buckets = [deepspeed_json(run, 4, "float32", size)["zero_optimization"]["reduce_bucket_size"] for size in (1000, 10**10)]
    assert buckets == [1000, 500_000_000]  # never larger than the model
    assert derived["gradient_clipping"] == 0.5  # always there: DeepSpeed's default is 1.0
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["bf16"] == {"enabled": True}
    assert deepspeed_json(run, 4, "float32", 1000)["bf16"] == {"enabled": False}


def test_every_key_of_the_json_is_one_that_deepspeed_reads(group):
    """DeepSpeed accepts a misspelt top-level key in silence."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", "bf16",
                                                                                      "wall_clock_breakdown"}
    assert set(deepspeed_json(config(), 1, "float32", 1000)) <= known
    assert "gradient_cliping" not in known


@pytest.mark.parametrize(("world", "accumulation", "batch_size"), [(3, 1, 8), (1, 3, 8), (2, 8, 8), (4, 4, 24)])
def test_a_batch_that_cannot_be_divided_is_refused_with_its_numbers(world, accumulation, batch_size):
    run = config(batch_size=batch_size, accumulation=accumulation)
    with pytest.raises(UserError, match=rf"batch_size {batch_size} is not divisible by {world} processes x "
                                        rf"train\.accumulation {accumulation} = {world * accumulation}"):
        deepspeed_json(run, world, "float32", 1000)


@pytest.mark.parametrize(("asked", "device", "used"), [
    ("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("float32", "cuda", "float32"), ("bfloat16", "cpu", "bfloat16")])
def test_precision_is_what_was_asked_or_follows_from_the_device(asked, device, used):
    assert resolve_precision(config(precision=asked), torch.device(device)) == used


def test_one_process_is_the_first_and_agrees_with_itself(group):
    assert (group.rank, group.world_size, group.is_first) == (0, 1, True)
    assert group.any(True) is True
    assert group.any(False) is False
    assert (group.maximum(3.5), group.mean(-2.0)) == (3.5, -2.0)
    assert group.first_does(lambda: [1, 2]) == group.first_then_others(lambda: [1, 2]) == [1, 2]
    with pytest.raises(UserError, match="reason"):
        group.first_does(lambda: (_ for _ in ()).throw(UserError("reason")))


def test_on_the_cpu_nothing_is_compiled(group):
    import deepspeed

    if group.device.type == "cpu":
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("module", [small, lambda: tiny.seq2seq(learned_positions=True), tiny.vqgan],
                         ids=["small", "seq2seq", "vqgan"])
def test_decay_is_on_matrices_alone_and_every_parameter_is_trained_once(module):
    model = module()
    frozen = next(p for p in model.parameters() if p.ndim == 4 or p.ndim == 2)
    frozen.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    listed = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert names[id(frozen)] not in listed
    matrices = {f"{name}.weight" for name, m in model.named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.requires_grad}
    assert {name for name, decay in decays.items() if decay == 0.3} == matrices
    assert {name for name, decay in decays.items() if decay == 0.0} == set(listed) - matrices
    assert any(name.endswith("bias") for name in decays)


def test_the_optimizer_gets_its_numbers():
    optimizer = build_optimizer(small(), OptimConfig(lr=0.7, betas=(0.5, 0.6), weight_decay=0.0))
    assert optimizer.defaults["lr"] == 0.7
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
