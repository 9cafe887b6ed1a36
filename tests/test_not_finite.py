"""A loss or gradient that is not finite skips the step in every mode, and is counted and named."""

from __future__ import annotations

import math

import pytest
import torch

from tests.small_engine import (
    STAGES,
    assert_same_state,
    batch,
    config,
    engine_for,
    not_differentiable_here,
    small,
    squared_error,
    train,
    with_deepspeed,
)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "precision"), [*((stage, "float32") for stage in STAGES), (0, "bfloat16"), (1, "bfloat16"),
                                                  (2, "bfloat16")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_half", [0, 1])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(group, caplog, stage, precision, value, bad_half):
    run = config(stage, accumulation=2)
    engine = engine_for(small(), run, group, precision)
    train(engine, run, group, range(2))
    before = engine.full_state()
    for half in range(2):
        ids, target = batch(2 + half, group.device, size=4)
        loss = squared_error(engine(ids), target)
        terms = {"l1": loss.detach(), "commit": loss.detach()}
        if half == bad_half:  # an infinite loss whose own gradient is finite is skipped as well
            loss, terms = loss + value, {**terms, "commit": torch.tensor(value)}
        engine.backward(loss, 3, terms)
        engine.step(3)
    assert engine.skipped == 1
    assert "step 3 of the model is skipped: not finite: commit (1 skipped so far" in caplog.text
    assert_same_state(engine.full_state(), before, 0)
    assert all(math.isfinite(loss) for loss in train(engine, run, group, range(3, 5)))  # nothing is left of it
    assert engine.skipped == 1
    with pytest.raises(AssertionError):
        assert_same_state(engine.full_state(), before, 0)


def test_a_loss_without_terms_is_named_loss(group, caplog):
    engine = engine_for(small(), config(), group)
    engine.backward(squared_error(engine(batch(0, group.device)[0]), torch.tensor(math.nan)), 1)
    engine.step(1)
    assert "not finite: loss" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(("stage", "precision"), [*((stage, "float32") for stage in STAGES), (0, "bfloat16"), (1, "bfloat16")])
def test_a_gradient_that_is_not_finite_is_a_counted_skipped_step(group, caplog, stage, precision):
    run = config(stage)
    engine = engine_for(small(), run, group, precision)
    train(engine, run, group, range(2))
    before = engine.full_state()
    engine.backward(not_differentiable_here(engine(batch(2, group.device)[0])), 3)
    assert engine.step(3)[1] == 1
    assert "not finite: gradient" in caplog.text
    assert_same_state(engine.full_state(), before, 0)
    assert all(math.isfinite(loss) for loss in train(engine, run, group, range(3, 5)))


needs_float16 = pytest.mark.skipif(not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
                                   reason="this machine has no float16")


@pytest.mark.long
@needs_float16
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float16_finds_its_scale_trains_and_counts_no_incident(group, stage):
    run = with_deepspeed(stage)
    engine = engine_for(small(), run, group, "float16")
    applied, losses = [], []
    for step in range(10):
        engine.set_lr(0.02)
        ids, target = batch(step % 2, group.device)
        loss = squared_error(engine(ids), target)
        engine.backward(loss, step + 1)
        engine.step(step + 1)
        applied.append(engine.window_applied)
        losses.append(float(loss.detach()))
    assert applied[-1]
    assert losses[-1] < 0.9 * losses[1]
    assert engine.skipped == 0
    assert math.isfinite(engine.grad_norm)
    assert all(value.isfinite().all() for value in engine.full_state().values())


@needs_float16
def test_a_loss_that_is_not_finite_is_counted_in_float16_too(group):
    run = with_deepspeed(1)
    engine = engine_for(small(), run, group, "float16")
    for step in range(6):
        ids, target = batch(step, group.device)
        loss = squared_error(engine(ids), target)
        engine.backward(loss * (math.nan if step == 4 else 1.0), step + 1)
        engine.step(step + 1)
        assert engine.window_applied or step in (0, 1, 2, 4)
    assert engine.skipped == 1
