"""Cases of `python -m benchmarks attention`: ours, and one call with a dense mask."""

# Axes: B batch, H heads, n slots (prefix and image), d head width

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPES, SEED, Case
from seq2seq.attention import Pattern
from seq2seq.layers import PatternAttend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query, key, value [B, H, n, d] -> output [B, H, n, d]."""


class Problem(NamedTuple):
    """One attention call, as JSON values, so that a child process builds the same one."""

    pattern: str
    batch: int
    grid: int
    prefix: int
    convolution: int
    heads: int
    head_dim: int
    device: str
    dtype: str

    @property
    def slots(self) -> int:
        """n: the prefix and a square grid of image slots."""
        return self.prefix + self.grid**2

    def rule(self) -> Pattern:
        """Return the pattern: which slot sees which."""
        return Pattern(self.pattern, self.prefix, self.grid, self.convolution)


class Heads(NamedTuple):
    """Query, key, value and the gradient that arrives at the output, each [B, H, n, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor


def make_heads(problem: Problem) -> Heads:
    """Draw seeded noise, strided as a layer's projections leave it: [B, n, H, d] transposed."""
    # drawn on the CPU: the same numbers for every device
    generator = torch.Generator().manual_seed(SEED)
    shape = (problem.batch, problem.slots, problem.heads, problem.head_dim)

    def draw() -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return noise.to(problem.device, DTYPES[problem.dtype]).transpose(1, 2)

    query, key, value, upstream = draw(), draw(), draw(), draw()
    return Heads(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), upstream)


def make_attend(side: str, problem: Problem) -> Attend:
    """Make the call of `ours` or the `peer`; the peer's mask is made here and not in each call."""
    if side == "ours":
        block = PatternAttend(problem.rule(), dropout=0.0)
        return lambda query, key, value: block(query, key, value)[0]  # [1]: intermediates
    mask = problem.rule().mask(problem.slots).to(problem.device)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value,
                                                                    attn_mask=mask)


def run_step(step: str, attend: Attend, heads: Heads) -> tuple[Tensor, ...]:
    """Return the output of `forward`; the output and gradients of q, k, v of `forward+backward`."""
    inputs = (heads.query, heads.key, heads.value)
    if step == "forward":
        with torch.no_grad():  # or the output would keep activations, which the memory would show
            return (attend(*inputs),)
    out = attend(*inputs)
    # autograd.grad adds nothing to .grad, so that rounds do not depend on one another
    return out.detach(), *torch.autograd.grad(out, inputs, heads.upstream)


def step_case(side: str, step: str, **problem: Any) -> Case:
    """Build a case that has run once: masks are made and kernels compiled before it is measured."""
    size = Problem(**problem)
    attend, heads = make_attend(side, size), make_heads(size)
    run_step(step, attend, heads)
    return lambda: run_step(step, attend, heads)
