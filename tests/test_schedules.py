"""Learning rates of every schedule: by hand, of the published recipes, and as the optimizer gets them."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.small_engine import assert_same_state, batch, config, engine_for, small, squared_error
from training.config.optim import OptimConfig
from training.engine.optim import SCHEDULES, lr_at

PARTI = {"name": "adafactor", "lr": 4.5e-5, "betas": (0.9, 0.96), "weight_decay": 0.045, "warmup_steps": 5000,
         "schedule": "exponential", "decay_start_step": 85_000, "final_lr_ratio": 0.025, "gradient_clipping": 4.0}
DALLE = {"lr": 4.5e-4, "betas": (0.9, 0.96), "weight_decay": 0.045, "warmup_steps": 5000, "schedule": "halving",
         "halve_at_steps": [100_000, 200_000, 300_000, 350_000, 400_000]}
EXAMPLES = {"halving": {"halve_at_steps": (6, 8)}}  # what a schedule cannot do without
CHOICES = {name: OptimConfig(lr=2.0, warmup_steps=4, schedule=name, final_lr_ratio=0.1, **EXAMPLES.get(name, {}))
           for name in SCHEDULES}


def rates(optim: OptimConfig, total: int, *steps: int) -> list[float]:
    return [lr_at(step, total, optim) for step in steps]


def test_the_learning_rate_of_parti():
    parti = OptimConfig(**PARTI)
    found = rates(parti, 450_000, 0, 2499, 4999, 5000, 84_999, 85_000, 267_500, 450_000)
    middle = 4.5e-5 * math.sqrt(0.025)  # half of the way in steps is half of the way in the logarithm
    assert found == pytest.approx([9e-9, 2.25e-5, 4.5e-5, 4.5e-5, 4.5e-5, 4.5e-5, middle, 1.125e-6], rel=1e-12)
    assert lr_at(85_001, 450_000, parti) / 4.5e-5 == pytest.approx(0.025 ** (1 / 365_000), rel=1e-12)


def test_an_exponential_decay_without_a_start_begins_after_the_warm_up():
    optim = OptimConfig(lr=1.0, warmup_steps=2, schedule="exponential", final_lr_ratio=0.25)
    assert rates(optim, 6, 0, 1, 2, 3, 4, 6, 99) == pytest.approx([0.5, 1, 1, 0.25**0.25, 0.5, 0.25, 0.25])


def test_the_learning_rate_of_dalle():
    found = rates(OptimConfig(**DALLE), 430_000, 2499, 4999, 99_999, 100_000, 199_999, 200_000, 300_000, 350_000, 429_999)
    assert [rate / 4.5e-4 for rate in found] == pytest.approx([0.5, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])


def test_inverse_square_root_and_linear_by_hand():
    inverse = OptimConfig(lr=1.0, warmup_steps=4, schedule="inverse_sqrt")
    assert rates(inverse, 100, 0, 1, 2, 3, 4, 16, 64, 10_000) == [0.25, 0.5, 0.75, 1, 1, 0.5, 0.25, 0.02]
    linear = OptimConfig(lr=1.0, warmup_steps=4, schedule="linear", final_lr_ratio=0.2)
    assert rates(linear, 12, 1, 3, 4, 6, 8, 12, 99) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.2, 0.2])
    to_zero = OptimConfig(lr=1.0, warmup_steps=0, schedule="linear", final_lr_ratio=0.0)
    assert rates(to_zero, 4, 0, 1, 2, 3, 4) == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_then_never_rises_and_ends_where_it_says(name):
    found = rates(CHOICES[name], 20, *range(21))
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(before >= after for before, after in itertools.pairwise(found[4:]))
    ends = {"constant": 1, "halving": 0.25, "inverse_sqrt": math.sqrt(4 / 20)}
    assert found[20] == pytest.approx(2.0 * ends.get(name, 0.1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_ends_within_its_warm_up_has_a_learning_rate(name):
    assert rates(CHOICES[name], 3, 0, 1, 2, 3) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(("warmup", "total", "ratio"), [(50, 1000, 0.05), (0, 7, 0.0), (10, 3, 0.5), (3, 3, 1.0)])
def test_cosine_and_constant_are_what_they_were_to_the_bit(warmup, total, ratio):
    """Runs from before the other schedules go on as they began."""
    for step in range(total + 5):
        cosine = OptimConfig(lr=0.3, warmup_steps=warmup, final_lr_ratio=ratio)
        if step < warmup:
            expected = 0.3 * (step + 1) / warmup
        else:
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            expected = 0.3 * (ratio + (1 - ratio) * (0.5 * (1 + math.cos(math.pi * progress))))
        assert lr_at(step, total, cosine).hex() == expected.hex()
        constant = OptimConfig(lr=0.3, warmup_steps=warmup, schedule="constant")
        assert lr_at(step, total, constant) == (expected if step < warmup else 0.3)


def test_learning_rates_by_hand():
    cosine = OptimConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    assert [lr_at(step, 12, cosine) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_at(8, 12, cosine) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert lr_at(6, 12, cosine) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)))
    assert lr_at(12, 12, cosine) == pytest.approx(0.1)
    assert lr_at(1000, 12, cosine) == pytest.approx(0.1)
    rates = [lr_at(step, 12, cosine) for step in range(12)]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.14


def test_a_constant_schedule_stays_after_its_warm_up():
    constant = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant", final_lr_ratio=0.0)
    assert [lr_at(step, 9, constant) for step in (0, 1, 2, 8, 100)] == [0.25, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_no_warm_up_starts_at_the_peak_and_a_run_shorter_than_its_warm_up_never_divides_by_zero(schedule):
    assert lr_at(0, 10, OptimConfig(lr=2.0, warmup_steps=0, schedule=schedule)) == 2.0
    assert lr_at(0, 1, OptimConfig(lr=2.0, warmup_steps=0, schedule=schedule)) == 2.0
    short = OptimConfig(lr=2.0, warmup_steps=50, schedule=schedule)
    assert [lr_at(step, 3, short) for step in range(3)] == pytest.approx([0.04, 0.08, 0.12])


def test_set_lr_reaches_the_optimizer(group):
    run = config(1)
    engine = engine_for(small(), run, group)
    before = engine.full_state()
    engine.set_lr(0.0)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert_same_state(engine.full_state(), before, 0)
