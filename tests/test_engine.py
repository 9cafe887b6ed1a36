"""DeepSpeed on one process is a plain PyTorch loop, at every ZeRO stage."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.small_engine import (
    STAGES,
    assert_same_state,
    batch,
    config,
    engine_for,
    plain_train,
    small,
    squared_error,
    train,
    with_deepspeed,
)
from tokenloom_common.errors import RunFailedError
from training.config.optim import OptimConfig
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.optim import build_optimizer


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_on_one_process_equals_a_plain_loop(group, stage):
    run, module = config(stage), small()
    plain = copy.deepcopy(module)
    expected, norms = plain_train(plain, run, group, range(8))
    assert min(norms) > run.optim.gradient_clipping  # clipping is at work in every step
    engine = engine_for(module, run, group)
    assert train(engine, run, group, range(8)) == pytest.approx(expected, abs=1e-6)
    assert_same_state(engine.full_state(), plain.state_dict(), 1e-6)
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_reported_gradient_norm_is_the_one_before_clipping(group, stage):
    run, module = config(stage), small()
    _, norms = plain_train(copy.deepcopy(module), run, group, range(1))
    engine = engine_for(module, run, group)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    norm, skipped = engine.step(1)
    assert norm == pytest.approx(norms[0], rel=1e-5)
    assert skipped == 0


@pytest.mark.parametrize("clipping", [0.0, 1e9])
def test_no_clipping_is_no_clipping(group, clipping):
    """DeepSpeed's own default is 1.0; a 0 must not mean that."""
    base = config()
    run = base.model_copy(update={"optim": base.optim.model_copy(update={"gradient_clipping": clipping}),
                                  "train": base.train.model_copy(update={"steps": 3})})
    module = small()
    with torch.no_grad():
        module.last.weight.mul_(30)
    plain = copy.deepcopy(module).to(group.device)
    ids, target = batch(0, group.device)
    squared_error(plain(ids), target).backward()
    assert float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])) > 2
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)  # Adam would hide the size of a gradient
    sgd.step()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.01), run, group, "float32")
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert_same_state(engine.full_state(), plain.state_dict(), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_8x1_equals_2x4(group, stage):
    states, losses = [], []
    for accumulation in (8, 2):
        run = config(stage, accumulation=accumulation)
        engine = engine_for(small(), run, group)
        losses.append(train(engine, run, group, range(4)))
        states.append(engine.full_state())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_same_state(states[0], states[1], 1e-6)


def test_weights_change_only_at_the_end_of_an_accumulation_window(group):
    run = config(accumulation=2)
    engine = engine_for(small(), run, group)
    states = [engine.full_state()]
    for part in range(4):
        ids, target = batch(part, group.device, size=4)
        engine.backward(squared_error(engine(ids), target), 1)
        engine.step(1)
        states.append(engine.full_state())
    changed = [not torch.equal(a["first.weight"], b["first.weight"]) for a, b in itertools.pairwise(states)]
    assert changed == [False, True, False, True]


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_and_stays_finite(group, stage):
    run = config(stage)
    engine = engine_for(small(), run, group, "bfloat16")
    before = engine.full_state()
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    losses = train(engine, run, group, range(3))
    after = engine.full_state()
    assert all(math.isfinite(loss) for loss in losses)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(after[name].dtype == torch.float32 for name, _ in small().named_parameters())
    assert not torch.equal(before["first.weight"], after["first.weight"])
    float32 = engine_for(small(), run, group)
    assert losses == pytest.approx(train(float32, run, group, range(3)), rel=0.15)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_exported_from_bfloat16_is_the_float32_weights_that_were_trained(group, stage):
    run = config(stage)
    engine = engine_for(small(), run, group, "bfloat16")
    train(engine, run, group, range(3))
    weight = engine.full_state()["first.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # finer than bfloat16
    torch.testing.assert_close(weight.bfloat16(), _gathered(engine.module.first.weight), rtol=0.01, atol=1e-3)


def _gathered(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().cpu().clone()


@pytest.mark.parametrize("stage", STAGES)
def test_full_state_is_the_modules_own_state(group, stage):
    module = small()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    state = engine_for(module, config(stage), group).full_state()
    assert_same_state(state, expected, 0)
    assert list(state) == list(expected)
    state["first.weight"].zero_()  # a copy: nothing in the engine changes with it
    small().load_state_dict(state)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_saved_and_loaded_into_a_fresh_engine_continues_to_the_bit(group, stage, tmp_path):
    run = config(stage)
    engine = engine_for(small(), run, group)
    train(engine, run, group, range(4))
    engine.save(tmp_path)
    assert not (tmp_path / "latest").exists()  # ours is latest.json, written last
    expected = [loss.hex() for loss in train(engine, run, group, range(4, 8))]
    fresh = engine_for(small(seed=1), run, group)
    fresh.load(tmp_path)
    assert [loss.hex() for loss in train(fresh, run, group, range(4, 8))] == expected
    assert_same_state(fresh.full_state(), engine.full_state(), 0)


def test_loading_needs_the_optimizer_state_too(group, tmp_path):
    """What a resume that restores the weights alone would give differs: the test above can fail."""
    run = config()
    engine = engine_for(small(), run, group)
    train(engine, run, group, range(4))
    module = small(seed=1)
    module.load_state_dict(engine.full_state())
    expected = train(engine, run, group, range(4, 8))
    assert train(engine_for(module, run, group), run, group, range(4, 8)) != expected


def test_loading_what_is_not_there_fails(group, tmp_path: Path):
    engine = engine_for(small(), config(), group)
    with pytest.raises(RunFailedError, match=r"deepspeed: not there for every process"):
        engine.load(tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_that_is_changed_in_place_is_taken_over(group, stage, precision):
    """K-means and restarts write a learned codebook; without this the optimizer's copy would undo it at the next step."""
    engine = engine_for(small(), config(stage), group, precision)
    weight = engine.module.embedding.weight
    with torch.no_grad():
        weight.fill_(3.0)
    engine.take_over([weight, weight])
    assert engine.full_state()["embedding.weight"].unique().tolist() == [3.0]
    engine.set_lr(0.0)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert weight.float().unique().tolist() == [3.0]


def test_an_engine_that_starts_later_has_its_own_schedule_and_folder(group, tmp_path):
    run, optim = config(), OptimConfig(lr=0.5, warmup_steps=2, schedule="constant", gradient_clipping=0.0)
    module = small()
    engine = Engine(module, build_optimizer(module, optim), run, group, "float32", optim, "discriminator", start_step=3)
    assert [engine.lr_of(step) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert deepspeed_json(run, 1, "float32", 10, optim)["gradient_clipping"] == 0.0
    engine.save(tmp_path)
    engine_for(small(), run, group).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"deepspeed", "deepspeed-discriminator"}


@pytest.mark.long
@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_what_is_kept_in_main_memory_changes_no_number(group, stage, offload):
    plain, run = config(stage), with_deepspeed(stage, deepspeed={"offload": offload})
    expected = train(engine_for(small(), plain, group), plain, group, range(6))
    engine = engine_for(small(), run, group)
    assert engine._engine.zero_offload_optimizer() is not None
    assert (engine._engine.zero_offload_param() is not None) == (offload == "parameters")
    assert train(engine, run, group, range(6)) == pytest.approx(expected, abs=1e-6)


def test_a_compiled_module_computes_the_same_and_keeps_its_names(group):
    plain, run = config(1), with_deepspeed(1, train={"compile": True})
    expected = train(engine_for(small(), plain, group), plain, group, range(3))
    engine = engine_for(small(), run, group)
    assert engine.module._compiled_call_impl is not None
    engine.module._compiled_call_impl = None  # compiling takes a minute and a compiler; that it was asked for is seen above
    assert train(engine, run, group, range(3)) == pytest.approx(expected, abs=1e-5)
    assert set(engine.full_state()) == set(small().state_dict())
