"""Loss on a held-out split: its mean, and its value at each position of the raster."""

# Axes: B batch, N image tokens, L layout tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from seq2seq import ImageTransformer, TextBatch
from training.data.tokens.shards import TokenShards
from training.data.visits.on_the_fly import OnTheFlyTokens, OnTheFlyVisits, tokenize_batch
from training.data.visits.order import ItemId
from training.data.visits.tokens import TokenVisits


@dataclass(frozen=True)
class HeldOut:
    """rows: images; loss: nats per token; by_position [N]: nats at each position of the raster."""

    rows: int
    loss: float
    by_position: list[float]

    @property
    def perplexity(self) -> float:
        """exp(loss): as many equally likely tokens at each position."""
        return float(numpy.exp(self.loss))

    def plain(self, split: str, grid: tuple[int, int]) -> dict[str, Any]:
        """Return the content of validation.json."""
        return {"split": split, "rows": self.rows, "loss": self.loss,
                "perplexity": self.perplexity, "grid": list(grid),
                "loss_by_position": [round(value, 5) for value in self.by_position]}


@torch.inference_mode()
def token_losses(model: ImageTransformer, text: TextBatch, tokens: Tensor,
                 layout: Tensor | None = None) -> Tensor:
    """Cross entropy of each token in nats: [B, N] float64 on the CPU.

    tokens: image tokens [B, N]. layout: [B, L], for models with one.
    """
    device = model.to_logits.weight.device
    tokens = tokens.to(device)
    if layout is not None:
        layout = layout.to(device)
    on_device = [part.to(device) for part in text]
    logits = model(*on_device, tokens, layout).image  # [B, N, K]
    # in float32, also where the model computes in bfloat16; cross_entropy takes classes second
    loss = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # [B, N]
    return loss.double().cpu()  # for sums over a whole split


@torch.inference_mode()
def validation_loss(model: ImageTransformer, shards: TokenShards | OnTheFlyTokens, collate: Any,
                    seed: int, batch_size: int = 64, first_caption: bool = False) -> HeldOut:
    """Measure the loss over a split: each row with one of its captions, none dropped or corrupted.

    collate: makes a TokenBatch of what token shards give, or an OnTheFlyBatch of what images give.
    """
    visits = _visits(model, shards, seed, first_caption)
    total = torch.zeros(model.config.num_tokens, dtype=torch.float64)  # [N]
    for start in range(0, len(shards), batch_size):
        rows = range(start, min(len(shards), start + batch_size))
        # always epoch 0: every measurement draws the same captions
        batch = collate(visits.__getitems__([ItemId(0, row) for row in rows]))
        if isinstance(shards, OnTheFlyTokens):
            batch = tokenize_batch(batch, shards.tokenizer, seed, 0.0)
        losses = token_losses(model, batch.text, batch.image_tokens, batch.layout)
        total += losses.sum(dim=0)
    by_position = (total / len(shards)).tolist()
    return HeldOut(len(shards), float(numpy.mean(by_position)), by_position)


def _visits(model: ImageTransformer, shards: TokenShards | OnTheFlyTokens, seed: int,
            first_caption: bool) -> Any:
    """Return the rows without dropped captions, mirrored views or anything else random."""
    if isinstance(shards, OnTheFlyTokens):
        resolution = shards.tokenizer.config.resolution
        return OnTheFlyVisits(shards.source, resolution, seed, 0.0, 0.0, first_caption)
    use_layout = model.config.layout_grid is not None
    # first_view: the shards may hold corners and mirrored views too
    return TokenVisits(shards, seed, caption_dropout=0.0, first_caption=first_caption,
                       first_view=True, use_layout=use_layout)
