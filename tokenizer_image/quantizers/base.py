"""Quantizer interface: latents -> codes -> code vectors, in float32, with named loss terms.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tokenizer_image.quantizer_config import QuantizerConfig


class LossPart(NamedTuple):
    """One loss term: `value` [] float32 before weighting, and its weight (negative: maximized)."""

    value: Tensor
    weight: float


class Quantized(NamedTuple):
    """Result of quantizing: vectors [B, D, h, w], codes [B, h, w*depth] int64, loss terms."""

    vectors: Tensor
    codes: Tensor
    losses: dict[str, LossPart]


class Quantizer(nn.Module, ABC):
    """Latents [B, D, h, w] <-> codes [B, h, w*depth], in float32 whatever the model runs in."""

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.codebook_size = codebook_size
        self.restarts = 0
        """Dead codes restarted since this was last reset to 0."""
        self.rewritten: list[nn.Parameter] = []
        """Parameters changed in place (k-means, restarts), for optimizers that hold copies."""

    # ---- to be implemented by each kind

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """All code vectors float32: [K, D], or [depth*K, D] for a residual quantizer."""

    @abstractmethod
    def search(self, latents: Tensor) -> Tensor:
        """`nearest` for finite float32 latents outside autocast."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w*depth] in [0, K) -> code vectors [B, D, h, w] float32."""

    @abstractmethod
    def quantize(self, latents: Tensor) -> Quantized:
        """`forward` for finite float32 latents outside autocast."""

    def code_tensors(self) -> dict[str, Tensor]:
        """Tensors that decide codes, by name: the codebook, and all else in the comparison."""
        return {"codebook": self.codebook}

    def code_counts(self) -> Tensor | None:
        """How often each code was found in training, lately [depth, K] float32; None if unknown."""
        return None

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Set the schedules for step `step` (from 0) of `total` -> their values, for the log."""
        return {}

    # ---- shared

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> codes [B, h, w*depth] int64 in [0, K).

        Changes no state. NaN and infinity count as 0.
        """
        with torch.autocast(latents.device.type, enabled=False), exact_float32_matmul():
            return self.search(zero_nonfinite(latents.float()))

    def forward(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] -> vectors with gradients; in training mode the codebook learns."""
        with torch.autocast(latents.device.type, enabled=False), exact_float32_matmul():
            raw = latents.float()
            clean = zero_nonfinite(raw)
            result = self.quantize(clean)

            # The codebook saw 0 instead of NaN, since a moving average never recovers from one. The
            # vectors get the NaN back, so that the loss shows it.
            vectors = result.vectors + (raw - clean).detach()
            return result._replace(vectors=vectors.to(latents.dtype))

    def mark_rewritten(self, parameter: nn.Parameter) -> None:
        """Add a parameter to `rewritten` unless it is there."""
        # by identity: `in` would compare tensors element by element
        if not any(parameter is known for known in self.rewritten):
            self.rewritten.append(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move buffers with `.to(device)` but keep their dtype.

        A moving average with decay 0.99 stands still in bfloat16. Parameters (a codebook learned by
        gradient, SimVQ's map) do follow `.bfloat16()` and `.double()`; what is computed from them
        is float32 all the same.
        """
        buffer_ids = {id(buffer) for buffer in self.buffers()}

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            dtype_changed = moved.dtype != tensor.dtype and tensor.is_floating_point()
            if id(tensor) in buffer_ids and dtype_changed:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_float32, recurse)


@contextmanager
def exact_float32_matmul() -> Iterator[None]:
    """Disable TF32 on CUDA inside the block: its 10-bit mantissa would find other codes."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def zero_nonfinite(latents: Tensor) -> Tensor:
    """Replace NaN and infinity by 0, without a gradient there."""
    return torch.where(torch.isfinite(latents), latents, 0.0)


def process_count() -> int:
    """Return the number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1
