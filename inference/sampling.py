"""From logits to the next token: guide -> temperature -> top-k -> top-p -> min-p -> sample.

Every function is pure: logits in, a new tensor out, randomness passed in. A filter keeps a token's
logit or sets it to -inf, always keeps the likeliest token, and never makes NaN.

A token is drawn by the Gumbel-max trick: the kept token whose logit plus noise is largest. The
noise is a function of (seed, position, token id) and of nothing else. So an image's tokens do not
depend on what shares its batch, and a position can be drawn again with the same noise. Two nearly
equal distributions nearly always draw the same token, as Jacobi decoding needs it
(`inference/generation/jacobi.py`).
"""

# Axes: B rows (one image each), K codebook size, k tokens that top-k leaves, N positions

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from tokenloom_common.config import StrictConfig, explain
from tokenloom_common.errors import UserError


class SamplingParams(StrictConfig):
    """Options of sampling. Filters apply in the order of the fields, each on what the last left.

    UserError, one line, for an unknown name (with the nearest one), a wrong type or value.
    """

    model_config = ConfigDict(strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(f"SamplingParams: {explain(type(self), error)}") from None

    guidance_scale: float = Field(
        3.0, ge=0, le=100, description="classifier-free guidance; 1 = off, and costs nothing")
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="linear, cosine: from 1 at the first token to guidance_scale at "
        "the last (Muse; RAR)")
    guidance_power: float = Field(
        1.0, gt=0, le=100, description="of the cosine schedule: larger stays near 1 for longer")
    guidance_end: float = Field(
        1.0, ge=0, le=1, description="share of the tokens that guidance acts on, from the first; "
        "what comes after costs half (Kynkaanniemi et al. 2024)")
    temperature: float = Field(1.0, ge=0, le=100, description="0 = always the likeliest token")
    top_k: int = Field(256, ge=0, description="keep exactly the k likeliest; 0 = all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="keep the fewest tokens whose probabilities reach p; 1 = all")
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens below min_p x the likeliest one's probability; "
        "0 = none")

    @model_validator(mode="after")
    def _only_what_is_read(self) -> SamplingParams:
        if self.guidance_power != 1.0 and self.guidance_schedule != "cosine":
            raise ValueError("guidance_power is of the cosine schedule, and guidance_schedule is "
                             f"{self.guidance_schedule}; leave it at 1, or choose cosine")
        return self


def guidance_at(params: SamplingParams, position: int, total: int) -> float:
    """Return the guidance scale of token `position` of `total`: 1 + (scale - 1) * ramp.

    The ramp of the schedules, with r = position / (total - 1):
    constant: 1; also that of a single token under any schedule.
    linear: r (Muse, Chang et al. 2023, section 2.7, https://arxiv.org/abs/2301.00704).
    cosine: (1 - cos(pi * r^power)) / 2 (RAR, Yu et al. 2024, https://arxiv.org/abs/2411.00776).

    From position guidance_end * total on the scale is 1 (a limited interval: Kynkaanniemi et al.
    2024, arXiv 2404.07724).
    """
    if position >= params.guidance_end * total:
        return 1.0
    if params.guidance_schedule == "constant" or total == 1:
        return params.guidance_scale
    ramp = position / (total - 1)
    if params.guidance_schedule == "cosine":
        ramp = (1 - math.cos(math.pi * ramp**params.guidance_power)) / 2
    return 1 + (params.guidance_scale - 1) * ramp


def guided_steps(params: SamplingParams, total: int) -> int:
    """Count the positions that need the unconditional branch: up to the last with a scale not 1."""
    for position in reversed(range(total)):
        if guidance_at(params, position, total) != 1.0:
            return position + 1
    return 0


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Return unconditional + scale * (conditional - unconditional), of logits [B, K].

    scale: one for all, or a tensor [B, 1].
    Classifier-free guidance: Ho & Salimans 2022, arXiv 2207.12598.
    """
    return unconditional + scale * (conditional - unconditional)


def likeliest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of logits [B, K], largest first, and their ids, both [B, k].

    Ties: the lower id first.
    k = 0 or k >= K: all of them in their own order, with ids 0 .. K - 1.
    """
    size = logits.shape[-1]
    ids = torch.arange(size, device=logits.device)
    if k <= 0 or k >= size:
        return logits, ids.expand_as(logits)
    # topk does not order ties: let it sort integers that all differ, the logit's bits, then the id
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    largest = ((bits.to(torch.int64) << 32) | (size - 1 - ids)).topk(k, dim=-1).values
    kept = size - 1 - (largest & 0xFFFFFFFF)
    return logits.gather(-1, kept), kept


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly min(k, K) logits per row of [B, K], on ties the lower id; k = 0 keeps all."""
    values, ids = likeliest(logits, k)
    return torch.full_like(logits, -torch.inf).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least p.

    Nucleus sampling: Holtzman et al. 2019, arXiv 1904.09751.
    """
    if p >= 1:
        return logits.clone()
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # mass of the likelier tokens, 0 for the first: that one is always kept
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept.scatter_(-1, order, mass_before < p)
    return logits.masked_fill(~kept, -torch.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than min_p times the likeliest.

    Nguyen et al. 2024, arXiv 2407.01082.
    """
    if min_p <= 0:
        return logits.clone()
    best = logits.amax(dim=-1, keepdim=True)
    return logits.masked_fill(logits < best + math.log(min_p), -torch.inf)


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return probabilities [B, K] float32 after temperature and filters; one-hot at temperature 0."""
    logits = logits.float()
    if params.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    # subtract the largest logit first, so that a tiny temperature cannot overflow
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / params.temperature
    logits = keep_top_k(logits, params.top_k)
    logits = keep_top_p(logits, params.top_p)
    logits = keep_min_p(logits, params.min_p)
    return logits.softmax(dim=-1)


def sample(logits: Tensor, params: SamplingParams, keys: Tensor, allow_sync: bool = True) -> Tensor:
    """Draw ids [B] int64 from guided logits [B, K] under noise keys [B] (`noise_keys`).

    Draws from `filtered_probabilities`: the kept id with the largest logit / temperature + Gumbel
    noise (Maddison et al. 2014, A* sampling, https://arxiv.org/abs/1411.0030). At temperature 0,
    the likeliest.
    allow_sync: False inside CUDA graph capture, where Python must not wait for a value; it does
    not change the ids.
    """
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if allow_sync:
        values, ids = _top_k(logits, params)  # [B, k]
    else:
        values, ids = likeliest(logits, params.top_k)

    # the filters work on the k candidates alone, since the others can never be drawn
    values = (values - values.amax(dim=-1, keepdim=True)) / params.temperature
    values = keep_top_p(values, params.top_p)
    values = keep_min_p(values, params.min_p)
    best = (values + gumbel_noise(keys, ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, best).squeeze(-1)


def _top_k(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Do what `likeliest` does, faster on the CPU: without sorting if there is no tie to decide."""
    k = params.top_k
    # top-p decides ties by order, so it needs the candidates of `likeliest`
    if logits.device.type == "cpu" and 0 < k < logits.shape[-1] and params.top_p == 1:
        values, ids = logits.topk(k, dim=-1, sorted=False)
        at_least_as_large = logits >= values.amin(dim=-1, keepdim=True)
        if int(at_least_as_large.sum()) == values.numel():
            return values, ids
    return likeliest(logits, k)


# ---- noise

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, SplitMix64's increment, as a signed number


def _mixed(z: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64, int64 -> int64 (Steele, Lea and Flood 2014,
    https://doi.org/10.1145/2660193.2660195)."""
    # products wrap around as they must; >> repeats the sign bit, so its copies are masked off
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def noise_keys(seeds: list[int], count: int) -> Tensor:
    """Return the noise keys [B, count] int64 of positions 0 .. count - 1, for each of B seeds.

    Computed in integers alone, so that a seed means the same noise on every device.
    """
    per_seed = _mixed(torch.tensor(seeds, dtype=torch.int64) + _GOLDEN)  # [B]
    positions = torch.arange(1, count + 1)
    return _mixed(per_seed[:, None] + positions * _GOLDEN)


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise [B, k] float64 of token ids [B, k] under keys [B].

    The noise of an id is -log(-log(u)), where u in (0, 1) is number `id` of the key's SplitMix64
    stream. float64, since in float32 u could round to 1, whose noise is infinite.
    """
    bits = _mixed(keys[:, None] + (ids + 1) * _GOLDEN)
    # the upper 53 bits; + 0.5: never 0. One expression: a named part would add to the peak memory
    uniform = (((bits >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))
