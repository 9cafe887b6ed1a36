"""Matrices of the lean decoder: several of a model's layers fused into one, in float or in 8-bit integers.

A fused matrix takes its sources over: their parameters become views of it (or 8-bit parts of it), so that the model keeps its
names and values and nothing is held twice.
"""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.decoder.large_pages import LargePages
from tokenloom_common.errors import UserError

Storage = Literal["rows", "columns"]
"""How float matrices lie in memory: `rows` [O, I] as torch's Linear has them, or `columns` [I, O]."""
Precision = Literal["float32", "bfloat16", "int8"]
"""Of the decoder's matrices."""


class Projection(Protocol):
    """x [M, I] -> [M, O]."""

    bias: Tensor | None
    scale_127: Tensor | None
    """Of each output, divided by 127; None for matrices in float."""

    @property
    def matrix(self) -> Tensor:
        """[O, I], as it is stored."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [M, O] + self(x), a new tensor."""
        ...


class Way(NamedTuple):
    """How float matrices lie in memory, and how few rows are multiplied with them; `inference.decoder.calibration` measures it.

    With storage `rows`: vector, whether one row is a product of the matrix and a vector; flipped_from, the number of rows from
    which W x^T is computed in the place of x W^T (0 = never); native_to, the number of rows up to which a step is compiled code
    of our own (`inference.decoder.native`; 0 = never).
    """

    storage: Storage = "rows"
    vector: bool = False
    flipped_from: int = 0
    native_to: int = 0


class Plan(NamedTuple):
    """How a decoder's matrices are made: in 8 bits or as they are, in which way, and where they are put."""

    int8: bool
    way: Way
    pages: LargePages


class FloatProjection:
    """One matrix for one or more `nn.Linear` with the same inputs, outputs one after another."""

    scale_127: Tensor | None = None

    def __init__(self, sources: Sequence[nn.Linear], plan: Plan) -> None:
        fused = _fused([source.weight.detach() for source in sources])  # [O, I]
        rows = plan.way.storage == "rows"
        self.weight_t = plan.pages.moved(fused.contiguous()).t() if rows else plan.pages.moved(fused.t().contiguous())  # [I, O]
        self.bias = _fused_bias(sources)
        self._way = plan.way
        start = 0
        for source in sources:
            end = start + source.out_features
            source.weight = nn.Parameter(self.weight_t[:, start:end].t(), requires_grad=False)
            start = end

    def __call__(self, x: Tensor) -> Tensor:
        out = self._special(x)
        if out is not None:
            return out if self.bias is None else out.add_(self.bias)
        return torch.mm(x, self.weight_t) if self.bias is None else torch.addmm(self.bias, x, self.weight_t)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        out = self._special(x)
        out = torch.addmm(residual, x, self.weight_t) if out is None else out.add_(residual)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def matrix(self) -> Tensor:
        """[O, I]."""
        return self.weight_t.t()

    def _special(self, x: Tensor) -> Tensor | None:
        if self._way.vector and len(x) == 1:
            return torch.mv(self.weight_t.t(), x[0]).unsqueeze(0)
        if self._way.flipped_from and len(x) >= self._way.flipped_from:
            return torch.mm(self.weight_t.t(), x.t()).t().contiguous()
        return None


class Int8Linear(nn.Module):
    """A part of an 8-bit matrix in the place of an `nn.Linear` of the training graph: [.., I] -> [.., O]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight_int8: Tensor
        self.scale: Tensor
        self.register_buffer("weight_int8", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> Tensor:
        """[O, I] in the scale's type."""
        return self.weight_int8.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, with the rounded weights."""
        return F.linear(x, self.weight, self.bias)


class Int8Projection:
    """Weights in 8 bits with a scale an output (symmetric, to the nearest).

    On the CPU inputs are rounded to 8 bits too, with a scale a row, so that a row's result does not depend on its neighbours,
    and are multiplied as integers, exactly (Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339, without its
    outliers). Elsewhere weights alone are rounded.
    """

    def __init__(self, sources: Sequence[nn.Linear], plan: Plan) -> None:
        whole = _fused([source.weight.detach() for source in sources])
        scale = whole.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny).float() / 127  # [O]
        self.matrix = plan.pages.moved((whole.float().contiguous() / scale[:, None]).round_().to(torch.int8))  # [O, I]
        self.scale = scale.to(whole.dtype)
        self._scale_127 = self.scale / 127
        self.scale_127: Tensor | None = self._scale_127
        self.bias = _fused_bias(sources)
        self._integers = whole.device.type == "cpu"
        self._matrix_t = self.matrix.t()
        self.parts = list(zip(self.matrix.split([source.out_features for source in sources]),
                              self.scale.split([source.out_features for source in sources]), strict=True))

    def replacements(self, sources: Sequence[nn.Linear]) -> list[Int8Linear]:
        """What stands in the place of each source in the training graph."""
        return [Int8Linear(weight, scale, source.bias) for source, (weight, scale) in zip(sources, self.parts, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        if self._integers:
            largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_min_(1e-30)  # [M, 1]
            integers = x.mul(127 / largest).round_().to(torch.int8)
            out = torch._int_mm(integers, self._matrix_t).mul(self._scale_127).mul_(largest)
        else:
            out = torch.mm(x, self._matrix_t.to(x.dtype)).mul_(self.scale)
        return out if self.bias is None else out.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(residual)


def _fused(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _fused_bias(sources: Sequence[nn.Linear]) -> Tensor | None:
    biases = [source.bias for source in sources]
    if all(bias is None for bias in biases):
        return None
    return _fused([torch.zeros_like(source.weight[:, 0]) if bias is None else bias.detach()
                   for source, bias in zip(sources, biases, strict=True)])


def project(parent: nn.Module, names: Sequence[str], plan: Plan) -> Projection:
    """The `nn.Linear` layers `names` of `parent` as one matrix, and in their places what shares its memory."""
    sources = [getattr(parent, name) for name in names]
    if not plan.int8:
        return FloatProjection(sources, plan)
    fused = Int8Projection(sources, plan)
    for name, replacement in zip(names, fused.replacements(sources), strict=True):
        setattr(parent, name, replacement)
    return fused


def check_precision(name: object) -> None:
    """UserError unless None or the name of a precision."""
    if name is not None and name not in get_args(Precision):
        raise UserError(f"weights '{name}': not a precision of weights; choose {', '.join(get_args(Precision))}")
