"""Gradients through a codebook lookup, and the VQ-VAE loss terms: shared by vq, residual and simvq.

Axes: B batch, h w latent grid, D length of a code vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers.base import LossPart


class CodeAssignment(NamedTuple):
    """Latents and the codes they were assigned to, before gradients are passed through."""

    target: Tensor
    """What was compared with the codes [B, D, h, w], with gradients to the latents."""
    vectors: Tensor
    """The chosen code vectors [B, D, h, w], with gradients to a codebook learned by gradient."""
    codes: Tensor
    """[B, h, w] int64."""


def pass_gradients(target: Tensor, vectors: Tensor, rotation_trick: bool) -> Tensor:
    """Return `vectors` [B, D, h, w] with gradients to `target`.

    Straight-through copies the gradient. The rotation trick (Fifty et al. 2024, arXiv 2410.06424)
    rotates and scales it as the target is rotated and scaled onto its vector.
    """
    vectors = vectors.detach()
    if not target.requires_grad:
        return vectors
    if not rotation_trick:
        return target + (vectors - target).detach()

    # the library's function takes vectors in the last dimension
    source = rearrange(target, "b d h w -> b h w d")
    destination = rearrange(vectors, "b d h w -> b h w d")
    return rearrange(rotate_to(source, destination), "b h w d -> b d h w")


def vq_losses(assignments: list[CodeAssignment], config: QuantizerConfig) -> dict[str, LossPart]:
    """Return the loss terms of van den Oord et al. 2017, eq. 3, as means over `assignments`.

    `commit` pulls latents to codes. `codebook` pulls codes to latents, with weight 1, where the
    optimizer moves codes.
    """
    commit = [F.mse_loss(one.target, one.vectors.detach()) for one in assignments]
    losses = {"commit": LossPart(torch.stack(commit).mean(), config.commitment_weight)}

    if config.learn_codebook_by_gradient or config.kind == "simvq":
        codebook = [F.mse_loss(one.vectors, one.target.detach()) for one in assignments]
        losses["codebook"] = LossPart(torch.stack(codebook).mean(), 1.0)
    return losses
