"""Draw the next token under guidance."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from inference.sampling import SamplingParams, guidance_at, guide, sample


@lru_cache(maxsize=64)
def _scales(params: SamplingParams, total: int, device: torch.device) -> Tensor:
    """Guidance [N] (or [L]) of each of `total` tokens."""
    return torch.tensor([guidance_at(params, at, total) for at in range(total)], device=device)


def _drawn(logits: Tensor, pictures: int, params: SamplingParams, scales: Tensor, keys: Tensor) -> Tensor:
    """Ids [b] from logits [b, K], or [2b, K] with the second branch's after them; guidance [b] or one for all; keys [b]."""
    logits = logits.float()
    if len(logits) > pictures:
        logits = guide(logits[:pictures], logits[pictures:], scales.view(-1, 1))
    return sample(logits, params, keys)
