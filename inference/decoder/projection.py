"""Matrices of the serving decoder: several linear layers fused into one, in float or int8.

A fused matrix owns the memory of its source layers: their parameters become views of it (or 8-bit
parts of it), so the model keeps its parameter names and values, and no weight is stored twice.
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
"""Memory order of a float matrix: `rows` [O, I] as in torch's Linear, or `columns` [I, O]."""
Precision = Literal["float32", "bfloat16", "int8"]
"""Number format of the decoder's matrices."""


class Projection(Protocol):
    """x [M, I] -> [M, O]."""

    bias: Tensor | None
    scale_127: Tensor | None
    """Scale [O] of each output divided by 127; None for float matrices."""

    @property
    def matrix(self) -> Tensor:
        """The stored matrix [O, I]."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual [M, O] + self(x), a new tensor."""
        ...


class MatmulStrategy(NamedTuple):
    """How float matrices are stored and multiplied with few rows; see `decoder.calibration`.

    storage: memory order. vector and flipped_from apply to storage `rows` alone.
    vector: multiply a single row as matrix times vector.
    flipped_from: least number of rows for which (W x^T)^T is computed instead of x W^T; 0 = never.
    native_to: most rows for which a step runs as our own compiled code
        (`inference.decoder.native`); 0 = never.
    """

    storage: Storage = "rows"
    vector: bool = False
    flipped_from: int = 0
    native_to: int = 0


class WeightStorage(NamedTuple):
    """How to store matrices: in 8 bits or not, for which matmul strategy, in whose memory."""

    int8: bool
    matmul: MatmulStrategy
    pages: LargePages


class FloatProjection:
    """One matrix for one or more `nn.Linear` with the same inputs; outputs one after another."""

    scale_127: Tensor | None = None

    def __init__(self, sources: Sequence[nn.Linear], storage: WeightStorage) -> None:
        fused = _concatenate([source.weight.detach() for source in sources])  # [O, I]
        if storage.matmul.storage == "rows":
            self.weight_t = storage.pages.moved(fused.contiguous()).t()  # [I, O]
        else:
            self.weight_t = storage.pages.moved(fused.t().contiguous())  # [I, O]
        self.bias = _concatenate_biases(sources)
        self._matmul = storage.matmul

        start = 0
        for source in sources:
            end = start + source.out_features
            source.weight = nn.Parameter(self.weight_t[:, start:end].t(), requires_grad=False)
            start = end

    def __call__(self, x: Tensor) -> Tensor:
        out = self._calibrated_product(x)
        if out is not None:
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight_t)
        return torch.addmm(self.bias, x, self.weight_t)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        out = self._calibrated_product(x)
        if out is None:
            out = torch.addmm(residual, x, self.weight_t)
        else:
            out.add_(residual)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def matrix(self) -> Tensor:
        """[O, I]."""
        return self.weight_t.t()

    def _calibrated_product(self, x: Tensor) -> Tensor | None:
        """x W^T [M, O] where the strategy has a special form for this number of rows, else None."""
        if self._matmul.vector and len(x) == 1:
            return torch.mv(self.weight_t.t(), x[0]).unsqueeze(0)
        if self._matmul.flipped_from and len(x) >= self._matmul.flipped_from:
            return torch.mm(self.weight_t.t(), x.t()).t().contiguous()
        return None


class Int8Linear(nn.Module):
    """Part of an 8-bit matrix in the place of an `nn.Linear`: [.., I] -> [.., O]."""

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
        """Dequantized weight [O, I] in the dtype of the scale."""
        return self.weight_int8.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the rounded weights to unrounded inputs, as nn.Linear would."""
        return F.linear(x, self.weight, self.bias)


class Int8Projection:
    """Weights in 8 bits with one scale per output: symmetric, rounded to nearest.

    On the CPU inputs are rounded to 8 bits as well, with one scale per row so that a row's result
    does not depend on its neighbours, and the product is exact in integers (LLM.int8() without
    outliers, Dettmers et al. 2022, https://arxiv.org/abs/2208.07339). Elsewhere only weights are
    rounded.
    """

    def __init__(self, sources: Sequence[nn.Linear], storage: WeightStorage) -> None:
        fused = _concatenate([source.weight.detach() for source in sources])  # [O, I]
        largest = fused.abs().amax(dim=1)
        # the smallest normal float keeps the scale of an all-zero output above zero
        scale = largest.clamp_min(torch.finfo(torch.float32).tiny).float() / 127  # [O]
        rounded = (fused.float().contiguous() / scale[:, None]).round_().to(torch.int8)
        self.matrix = storage.pages.moved(rounded)  # [O, I]
        self._matrix_t = self.matrix.t()
        self.scale = scale.to(fused.dtype)
        self._scale_127 = self.scale / 127
        self.scale_127: Tensor | None = self._scale_127
        self.bias = _concatenate_biases(sources)
        self._rounds_inputs = fused.device.type == "cpu"

        outputs = [source.out_features for source in sources]
        self.parts = list(zip(self.matrix.split(outputs), self.scale.split(outputs), strict=True))

    def replacements(self, sources: Sequence[nn.Linear]) -> list[Int8Linear]:
        """Return the layer that replaces each source in the training graph."""
        return [Int8Linear(weight, scale, source.bias)
                for source, (weight, scale) in zip(sources, self.parts, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        if self._rounds_inputs:
            largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)  # [M, 1]
            largest.clamp_min_(1e-30)  # a row of zeros stays zeros
            integers = x.mul(127 / largest).round_().to(torch.int8)
            # the input's scale is largest / 127: its 127 is already in scale_127
            out = torch._int_mm(integers, self._matrix_t).mul(self._scale_127).mul_(largest)
        else:
            out = torch.mm(x, self._matrix_t.to(x.dtype)).mul_(self.scale)
        return out if self.bias is None else out.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(residual)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the outputs; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _concatenate_biases(sources: Sequence[nn.Linear]) -> Tensor | None:
    """One bias [O] with zeros where a source has none; None if no source has one."""
    if all(source.bias is None for source in sources):
        return None
    biases = []
    for source in sources:
        if source.bias is None:
            biases.append(torch.zeros_like(source.weight[:, 0]))
        else:
            biases.append(source.bias.detach())
    return _concatenate(biases)


def fuse_linears(parent: nn.Module, names: Sequence[str], storage: WeightStorage) -> Projection:
    """Fuse the `nn.Linear` children `names` of `parent`, which become views of the result."""
    sources = [getattr(parent, name) for name in names]
    if not storage.int8:
        return FloatProjection(sources, storage)

    fused = Int8Projection(sources, storage)
    for name, replacement in zip(names, fused.replacements(sources), strict=True):
        setattr(parent, name, replacement)
    return fused


def check_precision(name: object) -> None:
    """Raise UserError unless `name` is None or a Precision."""
    if name is not None and name not in get_args(Precision):
        choices = ", ".join(get_args(Precision))
        raise UserError(f"weights '{name}': not a precision of weights; choose {choices}")
