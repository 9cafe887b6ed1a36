"""What the numbers are: PSNR, SSIM, running moments and the Frechet distance. Pure functions, no network, no file.

Pictures are 8-bit RGB everywhere, so that a number is about what a person is shown.
"""

# Axes: B batch, H W pixels, F features

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom_common.errors import DataError, RunFailedError, UserError

PERFECT_DB = 100.0  # PSNR of equal pictures, where the formula gives infinity
WINDOW = 11  # pixels on a side of SSIM's Gaussian window
WINDOW_SIGMA = 1.5
WINDOWS_AT_ONCE = 1 << 16  # pixels that SSIM works on at a time: few enough for the processor's cache


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 pixels [B, H, W, 3]: 10 log10(255^2 / mean squared error), at most 100."""
    error = (pixels.double() - other.double()).square().flatten(1).mean(dim=1)  # [B]
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PERFECT_DB)


def ssim(pixels: Tensor, other: Tensor) -> Tensor:
    """Structural similarity [B] in [-1, 1], 1 for equal, of uint8 pixels [B, H, W, 3]; the mean over positions and R, G, B.

    Wang et al. 2004, eq. 13 with its own window and constants: Gaussian 11 x 11, sigma 1.5, K1 0.01, K2 0.03, range 255,
    population covariance, only windows that lie whole inside the picture. UserError below 11 x 11 pixels.
    """
    if min(pixels.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs pictures of {WINDOW} pixels or more, got {pixels.shape[2]} x {pixels.shape[1]}")
    step = max(1, WINDOWS_AT_ONCE // (pixels.shape[1] * pixels.shape[2]))
    parts = [_ssim(a, b) for a, b in zip(pixels.split(step), other.split(step), strict=True)]
    return torch.cat(parts)


def _ssim(pixels: Tensor, other: Tensor) -> Tensor:
    x, y = (p.double().permute(0, 3, 1, 2) for p in (pixels, other))  # [B, 3, H, W]
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    cov = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(dim=1)


def _window_mean(image: Tensor) -> Tensor:
    """Gaussian-weighted means [B, 3, H-10, W-10] of image [B, 3, H, W]: the window is separable, rows then columns.

    Shifted sums, because torch's float64 convolution of single channels takes ten times as long.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    for axis in (2, 3):
        length = image.shape[axis] - WINDOW + 1
        mean = torch.zeros_like(image.narrow(axis, 0, length))
        for start, weight in enumerate((weights / weights.sum()).tolist()):
            mean.add_(image.narrow(axis, start, length), alpha=weight)
        image = mean
    return image


class Moments:
    """Mean and covariance of feature vectors that come in batches, in float64, without keeping the vectors.

    Batches are merged by Chan, Golub and LeVeque's update (1983), which does not subtract large numbers from each other.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)  # sum of outer products about the mean

    def update(self, features: Tensor) -> None:
        """Add features [B, F]. RunFailedError if one is not finite."""
        features = features.detach().double().cpu()
        if not torch.isfinite(features).all():
            raise RunFailedError("a feature is not finite; the feature network or its weights are broken")
        new = len(features)
        if not new:
            return
        mean = features.mean(dim=0)
        centred = features - mean
        shift, total = mean - self.mean, self.count + new
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * new / total)
        self.mean += shift * (new / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Unbiased covariance [F, F]. DataError with fewer than two vectors."""
        if self.count < 2:
            raise DataError(f"a Frechet distance needs at least 2 pictures, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet distance of two Gaussians with means [F] and covariances [F, F]; 0 when they are equal.

    Dowson and Landau 1982: |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the formula of FID (Heusel et al. 2017).
    With C = A A^T the last trace is the sum of the singular values of A1^T A2, which are real and not negative even when a
    covariance has no full rank, where the square root of the product C1 C2 itself is ill-conditioned.
    """
    first, second = _factor(covariance.double()), _factor(other_covariance.double())
    cross = torch.linalg.svdvals(first.T @ second).sum()
    squared = (mean.double() - other_mean.double()).square().sum()
    # rounding can leave a distance of nothing slightly below it
    return max(0.0, float(squared + covariance.double().trace() + other_covariance.double().trace() - 2 * cross))


def _factor(covariance: Tensor) -> Tensor:
    """A [F, R] with A A^T = covariance; directions that hold nothing but rounding are left out."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    smallest = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=0)
    kept = values > smallest
    return vectors[:, kept] * values[kept].sqrt()
