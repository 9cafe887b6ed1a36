"""Logit-Laplace likelihood of pixels (DALL-E, Ramesh et al. 2021, arXiv 2102.12092, appendix A.3).

Axes: B batch, C channels, S pixels of a side.
"""

from __future__ import annotations

import math

from torch import Tensor

MARGIN = 0.1  # pixels are moved into [0.1, 0.9], where their logits are small


def logit_laplace_loss(parameters: Tensor, image: Tensor) -> Tensor:
    """-log density of an image [B, C, S, S] in [-1, 1] under `parameters` -> mean [] in nats.

    parameters [B, 2C, S, S]: means and log-scales. The density of y = sigmoid(x), x ~ Laplace(mean,
    b), is exp(-|logit(y) - mean| / b) / (2 b y (1 - y)); y is the image in [margin, 1 - margin]
    (eq. 2). It may be negative, as a density may exceed 1. In float32.
    """
    mean, log_scale = parameters.float().chunk(2, dim=1)
    from_zero = image.float().clamp(-1, 1) + 1  # in [0, 2]
    value = MARGIN + (1 - 2 * MARGIN) * from_zero / 2  # y

    distance = (value.logit() - mean).abs() * (-log_scale).exp()
    log_slope = (value * (1 - value)).log()  # of the sigmoid: the change of variables from x to y
    return (distance + log_scale + math.log(2) + log_slope).mean()


def logit_laplace_mean(parameters: Tensor) -> Tensor:
    """Means and log-scales [B, 2C, S, S] -> the image of the means [B, C, S, S].

    Within [-1.25, 1.25] before clamping.
    """
    mean, _ = parameters.chunk(2, dim=1)
    return (mean.sigmoid() - MARGIN) / (0.5 - MARGIN) - 1
