"""Losses of the caption -> image token model."""

# Axes: B batch, N image tokens, K codebook size

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def image_token_loss(logits: Tensor, image_tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats over all image tokens: logits [B, N, K], image_tokens [B, N] int64 -> scalar float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), image_tokens.flatten())
