"""Filters and sampling against short NumPy references."""

from __future__ import annotations

import numpy
import pytest
import scipy.stats
import torch

from inference.sampling import (
    SamplingParams,
    filtered_probabilities,
    guidance_at,
    guide,
    guided_steps,
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    likeliest,
    noise_keys,
    sample,
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


def test_the_likeliest_come_first_and_equal_ones_by_id():
    values = torch.tensor([[0.0, 2.0, -1.0, 2.0, -0.0, -3.0], [-1.0, -1.0, -2.0, -1.5, -1.0, -9.0]])
    found, ids = likeliest(values, 4)
    assert ids.tolist() == [[1, 3, 0, 4], [0, 1, 4, 3]]
    assert torch.equal(found, values.gather(1, ids))
    everything, all_ids = likeliest(values, 0)
    assert torch.equal(everything, values)
    assert all_ids.tolist() == [list(range(6))] * 2
    large = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).mul(3).round()  # many equal ones
    order = numpy.argsort(-large.numpy(), axis=1, kind="stable")[:, :100]
    assert numpy.array_equal(likeliest(large, 100)[1].numpy(), order)


def test_temperature_zero_is_the_likeliest_and_a_tiny_one_nearly_so():
    values = logits()
    best = values.argmax(dim=-1)
    for temperature in (0.0, 1e-6):
        params = SamplingParams(temperature=temperature, top_k=0)
        assert torch.equal(sample(values, params, noise_keys([3], 5)[0]), best)


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


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.3, top_k=6, top_p=0.95, min_p=0.02),
                                    SamplingParams(top_k=0), SamplingParams(top_k=17, temperature=0.5)])
@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_samples_follow_the_filtered_probabilities(params, along):
    values = logits(rows=1, seed=3)
    draws = 40_000
    keys = noise_keys([11], draws)[0] if along == "positions" else noise_keys(list(range(draws)), 1)[:, 0]
    ids = sample(values.expand(draws, -1), params, keys)
    expected = filtered_probabilities(values, params)[0].double() * draws
    observed = torch.bincount(ids, minlength=17).double()
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    rest = ~likely & (expected > 0)  # too rare for the test one by one
    pairs = list(zip(observed[likely].tolist(), expected[likely].tolist(), strict=True))
    if rest.any():
        pairs.append((float(observed[rest].sum()), float(expected[rest].sum())))
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    assert scipy.stats.chi2.sf(statistic, len(pairs) - 1) > 1e-3


def test_the_noise_is_gumbel_and_of_each_seed_position_and_token_its_own():
    noise = gumbel_noise(noise_keys(list(range(50)), 40).flatten(), torch.arange(30).expand(2000, -1))  # [2000, 30]
    assert scipy.stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    assert len(noise.unique()) == noise.numel()
    blocks = noise.view(50, 40, 30)
    for shifted in (blocks.roll(1, 0), blocks.roll(1, 1), blocks.roll(1, 2)):
        assert abs(float(numpy.corrcoef(blocks.flatten(), shifted.flatten())[0, 1])) < 4 / noise.numel() ** 0.5


def test_the_noise_is_splitmix64():
    """The stream of key 0 begins as the algorithm's published one does."""
    uniform = torch.exp(-torch.exp(-gumbel_noise(torch.tensor([0]), torch.arange(3)[None])))[0]
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert uniform.tolist() == pytest.approx([number / 2**64 for number in published], abs=1e-12)


def test_nearly_equal_distributions_draw_the_same_token_under_the_same_noise():
    values = logits(rows=1, size=100, seed=5).expand(2000, -1)
    nudged = values + 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    keys = noise_keys([1], 2000)[0]
    drawn = [sample(each, SamplingParams(top_k=0), keys) for each in (values, nudged)]
    assert (drawn[0] == drawn[1]).float().mean() > 0.95
    assert len(drawn[0].unique()) > 10


def test_a_filtered_token_is_never_drawn():
    values = torch.tensor([[-5.0, 1.0, 0.5, -9.0]]).expand(3000, -1)
    ids = sample(values, SamplingParams(top_k=2), noise_keys([0], 3000)[0])
    assert set(ids.tolist()) == {1, 2}


def test_guidance_scale_one_is_the_conditional_and_zero_the_unconditional():
    conditional, unconditional = logits(seed=1), logits(seed=2)
    assert torch.allclose(guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional, atol=1e-5)


def test_each_pictures_noise_is_its_seeds_alone():
    alone, together = noise_keys([7], 9), noise_keys([3, 7, 2**63 - 1], 9)
    assert torch.equal(alone[0], together[1])
    assert len(together.unique()) == 27


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
    half = SamplingParams(guidance_scale=5.0, guidance_end=0.5)
    assert [guidance_at(half, i, 5) for i in range(5)] == [5.0, 5.0, 5.0, 1.0, 1.0]
    assert [guided_steps(params, 5) for params in (constant, linear, half, SamplingParams(guidance_scale=1.0))] == [5, 5, 3, 0]
    assert guided_steps(SamplingParams(guidance_end=0.0), 5) == 0


def test_a_power_that_nothing_reads_is_refused():
    with pytest.raises(UserError, match="guidance_power is of the cosine schedule"):
        SamplingParams(guidance_power=2.0)
    with pytest.raises(UserError, match="guidance_schedule"):
        SamplingParams(guidance_schedule="square")
