"""The share of what tells images apart that reconstructions keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.evaluation.image_metrics.image_spread import ImageSpread

SIDE = 8


def images(count: int = 40, seed: int = 0) -> Tensor:
    """Independent pixels of an image with a colour of its own [count, 3, SIDE, SIDE]."""
    generator = torch.Generator().manual_seed(seed)
    colour = 0.3 * torch.randn(count, 3, 1, 1, generator=generator)
    return (colour + 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)).clamp(-1, 1)


def lines(count: int = 40) -> Tensor:
    """One dark column on white, at another place in each."""
    drawn = torch.ones(count, 3, SIDE, SIDE)
    for number in range(count):
        drawn[number, :, :, number % SIDE] = -1
    return drawn


def kept(image: Tensor, reconstruction: Tensor, batch: int = 40) -> float | None:
    spread = ImageSpread(SIDE, SIDE)
    for start in range(0, len(image), batch):
        spread.update(image[start:start + batch], reconstruction[start:start + batch])
    return spread.kept()


@pytest.mark.parametrize("data", [images(), lines(), images() * 0.1], ids=["pixels", "lines", "pale"])
@pytest.mark.parametrize(("change", "expected"), [
    (lambda image: image, 1.0),
    (lambda image: image.mean(0).expand_as(image), 0.0),  # the mean image
    (lambda image: image.median(0).values.expand_as(image), 0.0),  # blank paper
    (lambda image: torch.full_like(image, -0.5), 0.0),
    (lambda image: 0.5 * image + 0.1, 0.5)],  # pale, of another brightness
    ids=["equal", "mean", "median", "grey", "half the contrast"])
def test_one_image_for_all_keeps_nothing_and_a_copy_everything(data, change, expected):
    assert kept(data, change(data)) == pytest.approx(expected, abs=1e-6)


def test_what_varies_without_regard_to_the_image_keeps_nothing():
    data = images(2000)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(9)).clamp(-1, 1)
    drifting = torch.linspace(-1, 1, 2000).view(-1, 1, 1, 1).expand_as(data)  # as a network that still moves
    another = images(2000, seed=1)
    for reconstruction in (noise, drifting, another):
        assert kept(data, reconstruction) == pytest.approx(0, abs=0.02)


def test_images_that_come_back_as_their_mean_colour_do_not_come_through():
    data = images()
    assert kept(data, data.mean((2, 3), keepdim=True).expand_as(data)) == pytest.approx(0, abs=1e-6)


def test_plain_images_are_told_apart_by_their_colour():
    paper = images(count=40)[:, :, :1, :1].expand(40, 3, SIDE, SIDE)
    grain = 0.02 * torch.randn(paper.shape, generator=torch.Generator().manual_seed(1))
    for data in (paper, (paper + grain).clamp(-1, 1)):
        assert kept(data, paper) == pytest.approx(1, abs=0.01)
        assert kept(data, torch.zeros_like(data)) == pytest.approx(0, abs=1e-6)


def test_images_that_do_not_differ_have_no_share():
    same = images(1).expand(20, 3, SIDE, SIDE)
    noisy = (same + 0.003 * torch.randn(same.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    assert kept(same, torch.zeros_like(same)) is None
    assert kept(noisy, torch.zeros_like(same)) is None
    assert kept(images(1), images(1)) is None
    assert ImageSpread(SIDE, SIDE).kept() is None


def test_values_out_of_range_count_as_they_are_shown():
    data = images()
    assert kept(data, 5 + data) == pytest.approx(0, abs=1e-6)  # all white on the screen


def test_a_reconstruction_that_is_not_finite_has_no_share_until_a_new_start():
    data, spread = images(), ImageSpread(SIDE, SIDE)
    spread.update(data, torch.where(data > 0.5, torch.nan, data))
    assert spread.kept() is None
    spread.clear()
    spread.update(data, data)
    assert spread.kept() == pytest.approx(1)


def test_batches_processes_and_a_stop_change_nothing():
    data = images(48)
    blurred = 0.7 * data + 0.3 * data.roll(1, 3)
    whole = kept(data, blurred, batch=48)
    assert 0.5 < whole < 1
    assert kept(data, blurred, batch=1) == pytest.approx(whole, abs=1e-6)

    parts = [ImageSpread(SIDE, SIDE), ImageSpread(SIDE, SIDE)]
    parts[0].update(data[:30], blurred[:30])
    parts[1].update(data[30:], blurred[30:])
    others = iter(parts[1].state().values())
    assert parts[0].kept(lambda tensor: tensor + next(others)) == pytest.approx(whole, abs=1e-6)

    resumed = ImageSpread(SIDE, SIDE)
    resumed.restore(parts[0].state())
    for spread in (parts[0], resumed):
        spread.update(data[30:], blurred[30:])
    assert resumed.kept() == parts[0].kept()
