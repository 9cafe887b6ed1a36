"""Filters and sampling against short NumPy references."""

from __future__ import annotations

import numpy
import pytest
import torch

from inference.sampling import (
    SamplingParams,
    filtered_probabilities,
    guidance_at,
    guide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
    uniform_numbers,
)
from tokenloom_common.errors import UserError


def logits(rows: int = 5, size: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def softmax(row: numpy.ndarray) -> numpy.ndarray:
    weights = numpy.exp(row - row.max())
    return weights / weights.sum()


def kept(filtered: torch.Tensor) -> list[set[int]]:
    return [set(torch.isfinite(row).nonzero().flatten().tolist()) for row in filtered]


@pytest.mark.parametrize("k", [1, 3, 16, 17, 100])
def test_top_k_keeps_what_numpy_keeps(k):
    values = logits()
    expected = [set(numpy.argsort(-row, kind="stable")[:k].tolist()) for row in values.numpy()]
    assert kept(keep_top_k(values, k)) == expected


def test_top_k_keeps_exactly_k_on_ties_and_prefers_low_ids():
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(keep_top_k(values, 2)) == [{1, 2}]
    assert kept(keep_top_k(torch.zeros(1, 9), 4)) == [{0, 1, 2, 3}]


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.8, 0.999, 1.0])
def test_top_p_keeps_what_numpy_keeps(p):
    values = logits()
    expected = []
    for row in values.double().numpy():
        order = numpy.argsort(-row, kind="stable")
        mass = numpy.cumsum(softmax(row)[order])
        expected.append(set(order[: int(numpy.searchsorted(mass, p)) + 1].tolist()) if p < 1 else set(range(17)))
    assert kept(keep_top_p(values, p)) == expected


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_numpy_keeps(min_p):
    values = logits()
    expected = []
    for row in values.double().numpy():
        chances = softmax(row)
        expected.append({i for i, chance in enumerate(chances) if chance >= min_p * chances.max() * (1 - 1e-6)})
    assert kept(keep_min_p(values, min_p)) == expected


def test_filters_leave_their_input_alone():
    values = logits()
    before = values.clone()
    for result in (keep_top_k(values, 3), keep_top_p(values, 0.5), keep_min_p(values, 0.5), keep_top_k(values, 0)):
        result.fill_(7)
    assert torch.equal(values, before)


def test_temperature_zero_is_the_likeliest_and_a_tiny_one_nearly_so():
    values = logits()
    best = values.argmax(dim=-1)
    for temperature in (0.0, 1e-6):
        params = SamplingParams(temperature=temperature, top_k=0)
        assert torch.equal(sample(values, params, torch.full((5,), 0.999)), best)


@pytest.mark.parametrize("extreme", [0.0, 1e30, -1e30])
def test_probabilities_are_never_nan(extreme):
    values = logits()
    values[0] = extreme
    values[1, 3] = torch.inf if extreme > 0 else values[1, 3]
    values[2, 1:] = -torch.inf
    values[1] = values[1].clamp(max=1e30)
    result = filtered_probabilities(values, SamplingParams(temperature=1e-3, top_k=5, top_p=0.5, min_p=0.5))
    assert torch.isfinite(result).all()
    assert torch.allclose(result.sum(dim=-1), torch.ones(5))


def test_samples_follow_the_filtered_probabilities():
    params = SamplingParams(temperature=1.3, top_k=6, top_p=0.95, min_p=0.02)
    values = logits(rows=1, seed=3)
    draws = 20_000
    uniform = uniform_numbers([11], draws)[0]
    ids = sample(values.expand(draws, -1), params, uniform)
    observed = torch.bincount(ids, minlength=17) / draws
    assert (observed - filtered_probabilities(values, params)[0]).abs().max() < 0.01


def test_a_filtered_token_is_never_drawn_even_at_the_ends_of_the_interval():
    values = torch.tensor([[-5.0, 1.0, 0.5, -9.0]]).expand(3, -1)
    ids = sample(values, SamplingParams(top_k=2), torch.tensor([0.0, 1 - 1e-12, 1.0]))
    assert set(ids.tolist()) <= {1, 2}


def test_guidance_scale_one_is_the_conditional_and_zero_the_unconditional():
    conditional, unconditional = logits(seed=1), logits(seed=2)
    assert torch.allclose(guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional, atol=1e-5)


def test_each_picture_draws_from_its_own_generator():
    alone, together = uniform_numbers([7], 9), uniform_numbers([3, 7, 8], 9)
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("field", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
                                              ("min_p", -0.1), ("guidance_scale", -1), ("temperature", float("nan"))])
def test_impossible_parameters_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        SamplingParams.parse({field: value}, "sampling options")


def test_an_unknown_parameter_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        SamplingParams.parse({"temprature": 1.0}, "sampling options")


def test_guidance_schedules_by_hand():
    constant = SamplingParams(guidance_scale=5.0)
    linear = SamplingParams(guidance_scale=5.0, guidance_schedule="linear")
    cosine = SamplingParams(guidance_scale=5.0, guidance_schedule="cosine")
    powered = SamplingParams(guidance_scale=5.0, guidance_schedule="cosine", guidance_power=2.0)
    assert [guidance_at(constant, i, 5) for i in range(5)] == [5.0] * 5
    assert [guidance_at(linear, i, 5) for i in range(5)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [guidance_at(cosine, i, 5) for i in (0, 2, 4)] == pytest.approx([1.0, 3.0, 5.0])
    assert guidance_at(cosine, 1, 5) == pytest.approx(1 + 4 * (1 - 2**-0.5) / 2)
    assert guidance_at(powered, 2, 5) == pytest.approx(1 + 4 * (1 - 2**-0.5) / 2)  # (1/2)^2 = 1/4
    assert guidance_at(linear, 0, 1) == 5.0


def test_a_power_that_nothing_reads_is_refused():
    with pytest.raises(UserError, match="guidance_power is of the cosine schedule"):
        SamplingParams(guidance_power=2.0)
    with pytest.raises(UserError, match="guidance_schedule"):
        SamplingParams(guidance_schedule="square")
