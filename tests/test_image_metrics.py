"""PSNR, SSIM, LPIPS and the Frechet distance, each against an independent definition."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from PIL import ImageFilter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.evaluation_images import disc, gaussian, pairs, scipy_distance, stack, stripes
from tokenizer_image import LPIPS
from tokenizer_image.images import pixels_to_float
from tokenizer_image.perceptual import NETWORKS
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.evaluation.image_metrics import pixel_metrics
from training.evaluation.image_metrics.pixel_metrics import Moments, frechet_distance, psnr, ssim

# ---- PSNR and SSIM ----

def test_psnr_is_that_of_scikit_image():
    originals, others = pairs()
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(originals, others, strict=True)]
    assert psnr(originals, others).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64, 1 << 16])
def test_ssim_is_that_of_scikit_image(monkeypatch, at_once):
    monkeypatch.setattr(pixel_metrics, "WINDOWS_AT_ONCE", at_once)
    originals, others = pairs()
    expected = [structural_similarity(a.numpy(), b.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for a, b in zip(originals, others, strict=True)]
    assert min(expected) < 0 < 0.5 < max(expected)  # the pictures reach over the range
    assert ssim(originals, others).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(others, originals).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_equal_pictures_is_1_and_of_oblong_ones_is_defined():
    originals, others = pairs()
    assert ssim(originals, originals).tolist() == pytest.approx([1.0] * len(originals), abs=1e-12)
    wide, other = originals[:, 10:21], others[:, 10:21]  # exactly one window high
    expected = [structural_similarity(a.numpy(), b.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for a, b in zip(wide, other, strict=True)]
    assert ssim(wide, other).tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="SSIM needs pictures of 11 pixels or more, got 64 x 10"):
        ssim(originals[:, :10], others[:, :10])


# ---- moments and the Frechet distance ----

@pytest.mark.parametrize("seed", range(5))
def test_the_frechet_distance_is_the_formula_in_scipy(seed):
    first, second = gaussian(seed), gaussian(seed + 100)
    assert frechet_distance(*first, *second) == pytest.approx(scipy_distance(*first, *second), rel=1e-9)
    assert frechet_distance(*second, *first) == pytest.approx(scipy_distance(*first, *second), rel=1e-9)


def test_equal_gaussians_have_distance_0_and_a_shift_counts_squared():
    mean, covariance = gaussian(1, size=20)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(mean, covariance, mean, covariance) >= 0
    shift = torch.zeros_like(mean)
    shift[0], shift[3] = 3.0, -4.0
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(25, abs=1e-10)


def test_covariances_without_full_rank_by_hand_and_rotated():
    zero = torch.zeros(6, dtype=torch.float64)
    first = torch.tensor([4.0, 9.0, 0, 0, 1, 0], dtype=torch.float64)
    second = torch.tensor([1.0, 0, 16.0, 0, 1, 0], dtype=torch.float64)
    by_hand = ((first.sqrt() - second.sqrt()) ** 2).sum()  # covariances that commute
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    one, two = turn @ first.diag() @ turn.T, turn @ second.diag() @ turn.T
    assert frechet_distance(zero, one, zero, two) == pytest.approx(float(by_hand), abs=1e-12)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, one, zero, torch.zeros(6, 6)) == pytest.approx(float(first.sum()), abs=1e-12)


def test_few_samples_in_many_dimensions_keep_their_accuracy():
    vectors = torch.randn(10, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments(200)
    moments.update(vectors)
    assert frechet_distance(moments.mean, moments.covariance(), moments.mean, moments.covariance()) < 1e-10


@pytest.mark.parametrize("cut", [(1000,), (1, 999), (3,) * 333 + (1,), (0, 500, 0, 500)])
def test_streamed_moments_are_those_of_numpy(cut):
    vectors = torch.randn(1000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.01 + 1000  # far from 0
    moments = Moments(7)
    for part in vectors.split(list(cut)):
        moments.update(part)
    assert moments.count == 1000
    numpy.testing.assert_allclose(moments.mean, vectors.numpy().mean(0), rtol=1e-13)
    numpy.testing.assert_allclose(moments.covariance(), numpy.cov(vectors.numpy(), rowvar=False), rtol=1e-8, atol=1e-14)


def test_one_picture_has_no_covariance_and_a_feature_that_is_not_finite_stops():
    moments = Moments(3)
    moments.update(torch.ones(1, 3))
    with pytest.raises(DataError, match="at least 2 pictures, got 1"):
        moments.covariance()
    with pytest.raises(RunFailedError, match="not finite"):
        moments.update(torch.tensor([[1.0, math.nan, 0.0]]))


# ---- LPIPS with its real weights ----

@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_lpips_is_0_for_equal_pictures_and_grows_with_blur_and_noise(network):
    model = LPIPS.load(network)
    originals = [disc(1), stripes(2), disc(3), stripes(4)]
    image = pixels_to_float(stack(originals))
    rough = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    changes = {"blur": [pixels_to_float(stack([o.filter(ImageFilter.GaussianBlur(radius)) for o in originals]))
                        for radius in (0.5, 1, 3)],
               "noise": [(image + strength * rough).clamp(-1, 1) for strength in (0.02, 0.1, 0.5)]}
    assert model(image, image).tolist() == [0.0] * 4
    for what, changed in changes.items():
        means = [float(model(image, other).mean()) for other in changed]
        assert 0 < means[0] < means[1] < means[2], (what, means)
    other_pictures = float(model(image, image.roll(1, dims=0)).mean())
    assert other_pictures > float(model(image, changes["blur"][1]).mean())
