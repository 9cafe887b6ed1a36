"""From logits to the next token: guide -> temperature -> top-k -> top-p -> min-p -> sample.

Every function is pure: logits in, a new tensor out, randomness passed in. A filter keeps a token's logit or sets it to
-inf, always keeps the likeliest token, and never makes NaN.
"""

# Axes: B rows (one picture each), K codebook size

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from tokenloom_common.config import StrictConfig, explain
from tokenloom_common.errors import UserError


class SamplingParams(StrictConfig):
    """How tokens are drawn. The filters apply in the order of the fields, each on what the one before left.

    UserError, one line, for an unknown name (with the nearest one), another type, or a value out of range.
    """

    model_config = ConfigDict(strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"SamplingParams: {explain(type(self), error)}") from None

    guidance_scale: float = Field(3.0, ge=0, le=100, description="classifier-free guidance; 1 = off, and costs nothing")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="linear, cosine: from 1 at the first token to guidance_scale at the last (Muse; RAR)")
    guidance_power: float = Field(1.0, gt=0, le=100, description="of the cosine schedule: larger stays near 1 for longer")
    temperature: float = Field(1.0, ge=0, le=100, description="0 = always the likeliest token")
    top_k: int = Field(256, ge=0, description="keep exactly the k likeliest; 0 = all")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the fewest tokens whose probabilities reach p; 1 = all")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below min_p x the likeliest one's probability; 0 = none")


    @model_validator(mode="after")
    def _only_what_is_read(self) -> SamplingParams:
        if self.guidance_power != 1.0 and self.guidance_schedule != "cosine":
            raise ValueError(f"guidance_power is of the cosine schedule, and guidance_schedule is {self.guidance_schedule}; "
                             "leave it at 1, or choose cosine")
        return self


def guidance_at(params: SamplingParams, position: int, total: int) -> float:
    """The guidance scale of token `position` of `total`: 1 + (scale - 1) * ramp, with r = position / (total - 1).

    constant: ramp 1. linear: r (Muse, Chang et al. 2023, section 2.7, https://arxiv.org/abs/2301.00704).
    cosine: (1 - cos(pi * r^power)) / 2 (RAR, Yu et al. 2024, https://arxiv.org/abs/2411.00776). A single token has ramp 1.
    """
    if params.guidance_schedule == "constant" or total == 1:
        return params.guidance_scale
    done = position / (total - 1)
    ramp = done if params.guidance_schedule == "linear" else (1 - math.cos(math.pi * done**params.guidance_power)) / 2
    return 1 + (params.guidance_scale - 1) * ramp


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """unconditional + scale * (conditional - unconditional) on logits [B, K] (Ho & Salimans 2022, arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly min(k, K) logits a row [B, K]; among equal ones the lower id stays. k = 0 keeps all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits.clone()
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # [B, k]
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, True)
    return logits.masked_fill(~kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2019, arXiv 1904.09751)."""
    if p >= 1:
        return logits.clone()
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens; 0 for the first
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before < p)
    return logits.masked_fill(~kept, -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    if min_p <= 0:
        return logits.clone()
    best = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < best + torch.log(torch.tensor(min_p, dtype=logits.dtype)).to(logits.device), -torch.inf)


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [B, K] float32 after temperature, top-k, top-p and min-p; temperature 0 gives the likeliest one 1."""
    logits = logits.float()
    if params.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    # the largest logit is taken off first, so that a tiny temperature cannot overflow
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    logits = keep_min_p(keep_top_p(keep_top_k(logits, params.top_k), params.top_p), params.min_p)
    return logits.softmax(dim=-1)


def sample(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Next ids [B] int64 from guided logits [B, K] and one uniform number in [0, 1) a row [B], by inverting the CDF.

    One number a row and step: a picture's tokens depend on its own generator only, not on its neighbours.
    """
    probabilities = filtered_probabilities(logits, params)
    cumulative = probabilities.double().cumsum(dim=-1)  # float64: the tail of a large codebook is not lost
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = cumulative.shape[-1] - 1 - (probabilities.flip(-1) > 0).to(torch.int64).argmax(dim=-1)  # last possible id
    return torch.minimum(ids, last)


def uniform_numbers(seeds: list[int], count: int) -> Tensor:
    """[len(seeds), count] float64 in [0, 1): row i is drawn by its own generator seeded with seeds[i], on the CPU.

    Always on the CPU, so that a seed means the same numbers on every device.
    """
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
