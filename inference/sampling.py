"""From logits to the next token: guide -> temperature -> top-k -> top-p -> min-p -> sample.

Every function is pure: logits in, a new tensor out, randomness passed in. A filter keeps a token's logit or sets it to
-inf, always keeps the likeliest token, and never makes NaN.

A token is drawn by the Gumbel-max trick: the kept token whose logit plus noise is largest. The noise is a function of (seed,
position, token id) and of nothing else. So a picture's tokens do not depend on what shares its batch, a position can be drawn
again with the same noise, and two nearly equal distributions draw the same token nearly always, which is what
`inference/generation/jacobi.py` lives on.
"""

# Axes: B rows (one picture each), K codebook size, k tokens that top-k leaves, N positions

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
    guidance_end: float = Field(1.0, ge=0, le=1, description="share of the tokens that guidance acts on, from the first; what "
                                "comes after costs half (Kynkaanniemi et al. 2024)")
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
    From position guidance_end * total on it is 1 (a limited interval: Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """
    if position >= params.guidance_end * total:
        return 1.0
    if params.guidance_schedule == "constant" or total == 1:
        return params.guidance_scale
    done = position / (total - 1)
    ramp = done if params.guidance_schedule == "linear" else (1 - math.cos(math.pi * done**params.guidance_power)) / 2
    return 1 + (params.guidance_scale - 1) * ramp


def guided_steps(params: SamplingParams, total: int) -> int:
    """How many of `total` positions need the second branch: up to the last one whose scale is not 1."""
    return max((at + 1 for at in range(total) if guidance_at(params, at, total) != 1.0), default=0)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """unconditional + scale * (conditional - unconditional) on logits [B, K] (Ho & Salimans 2022, arXiv 2207.12598); the scale
    is one for all, or a tensor of one for each row."""
    return unconditional + scale * (conditional - unconditional)


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits [B, k] of [B, K] and their ids, the largest first; among equal ones the lower id comes first.

    k = 0, or above K: all of them in their own order, with ids 0 .. K - 1.
    """
    size = logits.shape[-1]
    ids = torch.arange(size, device=logits.device)
    if k <= 0 or k >= size:
        return logits, ids.expand_as(logits)
    # topk says nothing about ties, so it sorts whole numbers that are all different: the logit's bits, then the id
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the floats
    chosen = ((bits.to(torch.int64) << 32) | (size - 1 - ids)).topk(k, dim=-1).values
    kept = size - 1 - (chosen & 0xFFFFFFFF)
    return logits.gather(-1, kept), kept


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly min(k, K) logits a row [B, K]; among equal ones the lower id stays. k = 0 keeps all."""
    values, ids = likeliest(logits, k)
    return torch.full_like(logits, -torch.inf).scatter_(-1, ids, values)


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
    return logits.masked_fill(logits < best + math.log(min_p), -torch.inf)


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


def sample(logits: Tensor, params: SamplingParams, keys: Tensor, allow_sync: bool = True) -> Tensor:
    """Next ids [B] int64 from guided logits [B, K] and the noise's keys [B] (`noise_keys`), with the probabilities of
    `filtered_probabilities`: the kept id with the largest logit / temperature + Gumbel noise (Maddison et al. 2014,
    A* sampling, https://arxiv.org/abs/1411.0030). Temperature 0: the likeliest.

    allow_sync: False inside CUDA graph capture, where Python must not wait for a value; the ids are the same.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    values, ids = _candidates(logits.float(), params) if allow_sync else likeliest(logits.float(), params.top_k)  # [B, k]
    values = (values - values.amax(dim=-1, keepdim=True)) / params.temperature
    values = keep_min_p(keep_top_p(values, params.top_p), params.min_p)
    best = (values + gumbel_noise(keys, ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, best).squeeze(-1)


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What `likeliest` keeps. On the CPU, where asking costs nothing, without sorting when no tie has to be decided."""
    k = params.top_k
    if logits.device.type == "cpu" and 0 < k < logits.shape[-1] and params.top_p == 1:
        values, ids = logits.topk(k, dim=-1, sorted=False)
        if int((logits >= values.amin(dim=-1, keepdim=True)).sum()) == values.numel():
            return values, ids
    return likeliest(logits, k)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195), int64 -> int64.

    Products wrap around; >> repeats the sign, so its bits are masked off.
    """
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def noise_keys(seeds: list[int], count: int) -> Tensor:
    """Keys [len(seeds), count] int64 of the noise at positions 0 .. count - 1 of each seed. Whole numbers alone, so that a seed
    means the same noise on every device."""
    own = _mixed(torch.tensor(seeds, dtype=torch.int64) + _GOLDEN)  # [B]
    return _mixed(own[:, None] + torch.arange(1, count + 1) * _GOLDEN)


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise [B, k] float64 of token ids [B, k] under keys [B]: number `id` of the SplitMix64 stream of the key,
    as u in (0, 1), -> -log(-log(u))."""
    bits = _mixed(keys[:, None] + (ids + 1) * _GOLDEN)
    uniform = (((bits >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))
