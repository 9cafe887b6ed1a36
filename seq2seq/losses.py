"""Losses of the caption -> image token model."""

# Axes: B batch, S predicted slots, V classes, N image tokens, T text ids, M masked ids,
#       L layout tokens, K codebook size

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from seq2seq.image_transformer import TokenLogits
from seq2seq.text_tokenizer import NULL, UNKNOWN
from tokenloom_common.config import StrictConfig


class TokenLossConfig(StrictConfig):
    """Weights of the loss terms. Each term is a mean over its own tokens."""

    image_weight: float = Field(
        1.0, gt=0, description="of the image tokens' cross entropy (DALL-E: 7/8)")
    text_weight: float = Field(
        0.0, ge=0, description="of the text ids' cross entropy, for model.predict_text "
        "(DALL-E: 1/8)")
    layout_weight: float = Field(
        1.0, gt=0, description="of the layout tokens' cross entropy, for models with a layout")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a token's target that is spread over all codes")
    z_weight: float = Field(
        0.0, ge=0, description="of the mean of log(sum(exp(logits)))^2: keeps logits small "
        "(PaLM: 1e-4)")
    region_weights: dict[int, float] = Field(
        default_factory=dict, description="layout class -> weight of image tokens over it "
        "(Make-A-Scene weighs faces); other classes weigh 1")


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None,
               label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy in nats, a scalar float32.

    logits [B, S, V], targets [B, S] int64, weights [B, S] (none = 1); weights that sum to 0 give 0.
    With label smoothing e the target is 1 - e on the right class plus e / V on every class (Szegedy
    et al. 2016, section 7, https://arxiv.org/abs/1512.00567).
    """
    # float32 whatever the model is: 8 bits are too few for a sum of exponentials over V classes
    flat_logits = logits.float().flatten(0, 1)  # [B * S, V]
    flat_targets = targets.flatten()
    if weights is None:
        return F.cross_entropy(flat_logits, flat_targets, label_smoothing=label_smoothing)

    losses = F.cross_entropy(flat_logits, flat_targets, label_smoothing=label_smoothing,
                             reduction="none")
    flat_weights = weights.flatten().float()
    # the clamp makes 0 / 0 a 0, without a branch on a value of the device
    return (losses * flat_weights).sum() / flat_weights.sum().clamp(min=1e-9)


def image_token_loss(logits: Tensor, image_tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats over all image tokens.

    logits [B, N, K], image_tokens [B, N] int64 -> scalar float32.
    """
    return token_loss(logits, image_tokens)


def z_loss(logits: Tensor) -> Tensor:
    """Mean of log(Z)^2, Z the softmax's normaliser: logits [B, S, V] -> scalar float32.

    Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311.
    """
    return logits.float().logsumexp(dim=-1).square().mean()


def region_token_weights(layout: Tensor, layout_grid: tuple[int, int], grid: tuple[int, int],
                         weights: dict[int, float]) -> Tensor:
    """Weigh each image token by the layout class under its middle.

    layout [B, L] of classes -> weights [B, N] float32; classes without a weight weigh 1.
    """
    maps = layout.unflatten(1, layout_grid)  # [B, layout rows, layout columns]
    rows = _covering_cells(grid[0], layout_grid[0], layout.device)
    columns = _covering_cells(grid[1], layout_grid[1], layout.device)
    classes = maps[:, rows][:, :, columns].flatten(1)  # [B, N]

    token_weights = torch.ones_like(classes, dtype=torch.float32)
    for layout_class, weight in weights.items():
        token_weights = torch.where(classes == layout_class, weight, token_weights)
    return token_weights


def _covering_cells(count: int, coarse: int, device: torch.device) -> Tensor:
    """Index [count] of the coarse cell that holds the middle of each of `count` cells."""
    middles = torch.arange(count, device=device) + 0.5
    return (middles * (coarse / count)).long()


def loss_parts(logits: TokenLogits, config: TokenLossConfig, image_tokens: Tensor,
               image_weights: Tensor | None = None, layout_tokens: Tensor | None = None,
               text_targets: Tensor | None = None,
               text_mask: Tensor | None = None) -> dict[str, tuple[Tensor, float]]:
    """Return name -> (loss, weight): "image", and where the model has them "text", "layout", "z".

    text_targets [B, T]: ids to predict; text_mask [B, T] bool: which of them count (none = all).
    """
    image = token_loss(logits.image, image_tokens, image_weights, config.label_smoothing)
    parts = {"image": (image, config.image_weight)}
    if logits.text is not None:
        assert text_targets is not None, "a model that predicts text needs its ids"
        parts["text"] = (token_loss(logits.text, text_targets, text_mask), config.text_weight)
    if logits.layout is not None:
        assert layout_tokens is not None, "a model with a layout needs its tokens"
        parts["layout"] = (token_loss(logits.layout, layout_tokens), config.layout_weight)
    if config.z_weight:
        parts["z"] = (z_loss(logits.image), config.z_weight)
    return parts


# ---- masked text ids, as BERT's

PREDICTED = 0.15
"""Share of ids to predict."""
REPLACED, RANDOM = 0.8, 0.1
"""Shares of those that become the mask and a random id; the rest stay."""


class MaskedText(NamedTuple):
    """text_ids [.., T] int64 as the model reads them; predicted [.., T] bool: ids to predict."""

    text_ids: Tensor
    predicted: Tensor


def mask_text(text_ids: Tensor, vocab_size: int, generator: torch.Generator) -> MaskedText:
    """Hide text ids [.., T] int64 as BERT does.

    Each id is predicted with a chance of 15 %; of those, 80 % become the mask, 10 % a random id,
    and 10 % stay (Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805). The mask is
    UNKNOWN, which no caption contains because unknown characters are spelt in bytes. Padding, end
    and the null caption are neither predicted nor drawn.
    """
    # drawn for every id, predicted or not: how many are drawn does not depend on the captions
    choice, fate = torch.rand((2, *text_ids.shape), generator=generator)
    random_ids = torch.randint(NULL + 1, vocab_size, text_ids.shape, generator=generator)

    predicted = (text_ids > NULL) & (choice < PREDICTED)  # control symbols are 0 to NULL
    masked = predicted & (fate < REPLACED)
    randomised = predicted & (fate >= 1 - RANDOM)  # the other end of [0, 1): never both
    hidden = torch.where(masked, UNKNOWN, text_ids)
    return MaskedText(torch.where(randomised, random_ids, hidden), predicted)


def masked_text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over the M predicted ids; 0 if there are none.

    logits [M, V], targets [M] int64 -> scalar float32.
    """
    # a sum, since the mean over no ids is NaN
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))
