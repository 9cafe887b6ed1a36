"""PSNR, SSIM, running moments and the Frechet distance. Pure functions: no network, no file.

Images are 8-bit RGB everywhere, so that a number is about what a person is shown.
"""

# Axes: B batch, H W pixels, F features, R rank

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom_common.errors import DataError, RunFailedError, UserError

PERFECT_DB = 100.0  # PSNR of equal images, where the formula gives infinity
WINDOW = 11  # pixels on a side of SSIM's Gaussian window
WINDOW_SIGMA = 1.5  # pixels
SSIM_C1 = (0.01 * 255) ** 2  # (K1 L)^2 and (K2 L)^2 of Wang et al., with the range L = 255
SSIM_C2 = (0.03 * 255) ** 2
WINDOWS_AT_ONCE = 1 << 16  # pixels that SSIM works on at a time: few enough for the CPU's cache


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 pixels [B, H, W, 3], at most 100.

    10 log10(255^2 / mean squared error).
    """
    difference = pixels.double() - other.double()  # before subtracting: uint8 would wrap around
    mean_squared_error = difference.square().flatten(1).mean(dim=1)  # [B]
    decibels = 10 * torch.log10(255.0**2 / mean_squared_error)
    return decibels.clamp(max=PERFECT_DB)


def ssim(pixels: Tensor, other: Tensor) -> Tensor:
    """Structural similarity [B] in [-1, 1] of uint8 pixels [B, H, W, 3]; 1 for equal images.

    Mean over positions and over R, G, B. Wang et al. 2004 (Image Quality Assessment: From Error
    Visibility to Structural Similarity), eq. 13, with the paper's window and constants: Gaussian
    11 x 11, sigma 1.5, K1 0.01, K2 0.03, range 255, population covariance; only windows that lie
    whole inside the image. UserError below 11 x 11 pixels.
    """
    height, width = pixels.shape[1:3]
    if min(height, width) < WINDOW:
        raise UserError(f"SSIM needs pictures of {WINDOW} pixels or more, got {width} x {height}")
    images_at_once = max(1, WINDOWS_AT_ONCE // (height * width))
    parts = []
    for some, others in zip(pixels.split(images_at_once), other.split(images_at_once), strict=True):
        parts.append(_ssim(some, others))
    return torch.cat(parts)


def _ssim(pixels: Tensor, other: Tensor) -> Tensor:
    """Average eq. 13 of Wang et al. 2004 over the windows and colours of an image (eq. 17)."""
    x = pixels.double().permute(0, 3, 1, 2)  # [B, 3, H, W]
    y = other.double().permute(0, 3, 1, 2)

    # moments under the window (eq. 14 to 16), as E[xy] - E[x] E[y]: float64 leaves room for it
    mean_x = _window_mean(x)
    mean_y = _window_mean(y)
    variance_x = _window_mean(x * x) - mean_x**2
    variance_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y

    # luminance times contrast-and-structure, in the form with C3 = C2 / 2 that eq. 13 cancels to
    numerator = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    mean_term = mean_x**2 + mean_y**2 + SSIM_C1
    denominator = mean_term * (variance_x + variance_y + SSIM_C2)
    return (numerator / denominator).flatten(1).mean(dim=1)


def _window_mean(image: Tensor) -> Tensor:
    """Gaussian-weighted means [B, 3, H-10, W-10] of image [B, 3, H, W].

    The window is separable: rows, then columns. Shifted sums, because torch's float64 convolution
    of single channels takes ten times as long.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    gaussian = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    weights = (gaussian / gaussian.sum()).tolist()
    for axis in (2, 3):
        length = image.shape[axis] - WINDOW + 1
        mean = torch.zeros_like(image.narrow(axis, 0, length))
        for start, weight in enumerate(weights):
            mean.add_(image.narrow(axis, start, length), alpha=weight)
        image = mean
    return image


class Moments:
    """Running mean and covariance, in float64, of feature vectors that come in batches.

    Batches are merged by the update of Chan, Golub and LeVeque (1983), which does not subtract
    large numbers from each other.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        # sum of outer products of deviations from the mean, [F, F]
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [B, F]. RunFailedError if one is not finite."""
        features = features.detach().double().cpu()
        if not torch.isfinite(features).all():
            raise RunFailedError("a feature is not finite; the feature network or its weights are "
                                 "broken")
        new = len(features)
        if new == 0:
            return

        batch_mean = features.mean(dim=0)
        centred = features - batch_mean
        # deviations inside the batch, and those between its mean and the mean so far
        shift = batch_mean - self.mean
        total = self.count + new
        between = torch.outer(shift, shift) * (self.count * new / total)
        self._scatter += centred.T @ centred + between
        self.mean += shift * (new / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Return the unbiased covariance [F, F]. DataError with fewer than two vectors."""
        if self.count < 2:
            raise DataError(f"a Frechet distance needs at least 2 pictures, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor,
                     other_covariance: Tensor) -> float:
    """Squared Frechet distance between two Gaussians with means [F] and covariances [F, F].

    Dowson and Landau 1982: |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the formula of FID
    (Heusel et al. 2017). With C = A A^T the last trace is the sum of the singular values of
    A1^T A2, which are real and not negative even when a covariance has no full rank, where the
    square root of the product C1 C2 itself is ill-conditioned.
    """
    covariance = covariance.double()
    other_covariance = other_covariance.double()
    factor = _factor(covariance)  # [F, R]
    other_factor = _factor(other_covariance)
    cross = torch.linalg.svdvals(factor.T @ other_factor).sum()
    shift = mean.double() - other_mean.double()
    distance = shift.square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding can leave a distance of 0 slightly below it


def _factor(covariance: Tensor) -> Tensor:
    """Return A [F, R] with A A^T = covariance, without directions that hold only rounding."""
    # eigh reads one triangle only: the mean of both, in case rounding made them differ
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # the usual bound of a numerical rank, as in numpy.linalg.matrix_rank; eigenvalues are ascending
    largest = values[-1].clamp(min=0)
    smallest = len(values) * torch.finfo(values.dtype).eps * largest
    kept = values > smallest
    return vectors[:, kept] * values[kept].sqrt()
