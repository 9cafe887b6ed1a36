"""What every quantizer is: latents -> codes -> vectors, in float32, with the loss terms that it needs by name.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size, n latents of a batch (= B*h*w).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist

from tokenizer_image.quantizer_config import QuantizerConfig

SCORES_AT_ONCE = 1 << 22  # numbers of one block of scores or distances (16 MiB): memory that does not grow with K


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in float32 though the program allows TF32 on CUDA, whose 10 bits would find other codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LossPart(NamedTuple):
    """One term of a loss: `value` [] float32 before weighting, and its weight in the total (negative: made large)."""

    value: Tensor
    weight: float


class Quantized(NamedTuple):
    """What quantizing gives: vectors [B, D, h, w] float, codes [B, h, w*depth] int64, loss parts by name."""

    vectors: Tensor
    codes: Tensor
    losses: dict[str, LossPart]


class Quantizer(nn.Module, ABC):
    """Latents [B, D, h, w] <-> codes [B, h, w*depth]. Always in float32, whatever the rest runs in."""

    def __init__(self, dim: int, codebook_size: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.codebook_size = codebook_size
        self.restarts = 0
        """Dead codes restarted since it was last set to 0."""
        self.rewritten: list[nn.Parameter] = []
        """Parameters that were changed in place (k-means, restarts), which an optimizer with copies must take over."""

    def mark_rewritten(self, parameter: nn.Parameter) -> None:
        """Note a parameter in `rewritten`, once."""
        if not any(parameter is known for known in self.rewritten):
            self.rewritten.append(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`, but buffers keep their dtype: a moving average with decay 0.99 stands still in bfloat16.

        Parameters (a codebook learned by gradient, SimVQ's map) do follow `.bfloat16()` and `.double()`; what is computed
        from them is float32 all the same.
        """
        kept = {id(buffer) for buffer in self.buffers()}

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in kept or moved.dtype == tensor.dtype or not tensor.is_floating_point():
                return moved
            return tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """All code vectors float32: [K, D], or [depth*K, D] for a residual quantizer."""

    def code_tensors(self) -> dict[str, Tensor]:
        """What decides codes, by name: the codebook, and whatever else latents are compared with."""
        return {"codebook": self.codebook}

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Tell the quantizer which of `total` training steps comes next -> the values of its own schedules, for the log."""
        return {}

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Latents [B, D, h, w] -> codes [B, h, w*depth] int64 in [0, K). Changes nothing; NaN and infinity count as 0."""
        with torch.autocast(latents.device.type, enabled=False), exact_products():
            return self.search(finite(latents.float()))

    @abstractmethod
    def search(self, latents: Tensor) -> Tensor:
        """`nearest` for finite float32 latents outside autocast."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w*depth] in [0, K) -> code vectors [B, D, h, w] float32."""

    @abstractmethod
    def quantize(self, latents: Tensor) -> Quantized:
        """Float32 latents [B, D, h, w] -> codes with gradients passed through; a codebook learns in training mode."""

    def forward(self, latents: Tensor) -> Quantized:
        """Latents [B, D, h, w] -> codes and vectors with gradients. The codebook learns in training mode.

        A codebook that follows its latents would stay broken after one NaN: it sees 0 there, the vectors stay NaN.
        """
        with torch.autocast(latents.device.type, enabled=False), exact_products():
            full = latents.float()
            clean = finite(full)
            result = self.quantize(clean)
            vectors = result.vectors + (full - clean).detach()
            return result._replace(vectors=vectors.to(latents.dtype))


def finite(latents: Tensor) -> Tensor:
    """NaN and infinity become 0, without a gradient."""
    return torch.where(torch.isfinite(latents), latents, 0.0)


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def nearest_code(latents: Tensor, codebook: Tensor, unit_length: bool) -> Tensor:
    """Latents [B, D, h, w] and codes [K, D] -> the nearest code of each [B, h, w] int64; ties go to the lowest code.

    unit_length: the codes have length 1, so the largest product is the nearest.
    """
    # |z - e|^2 without |z|^2, which is the same for every code
    return largest_score(latents, codebook) if unit_length else largest_score(
        latents, codebook, codebook.square().sum(dim=1).neg(), scale=2)


def largest_score(latents: Tensor, rows: Tensor, offsets: Tensor | None = None, scale: float = 1) -> Tensor:
    """argmax over K of scale * (latent . row) + offset, ties to the lowest: latents [B, D, h, w], rows [K, D], offsets [K] ->
    [B, h, w] int64. In blocks of SCORES_AT_ONCE scores. `scale` is read with offsets alone."""
    batch, _, height, width = latents.shape
    flat = rearrange(latents, "b d h w -> (b h w) d")
    count = max(1, min(len(flat), SCORES_AT_ONCE // min(len(rows), 4096)))
    columns = max(1, SCORES_AT_ONCE // count)
    found = []
    for some in flat.split(count):
        best_score, best = some.new_full((len(some),), -torch.inf), flat.new_zeros(len(some), dtype=torch.int64)
        for start in range(0, len(rows), columns):
            part = rows[start:start + columns]
            scores = (some @ part.T if offsets is None
                      else torch.addmm(offsets[start:start + columns], some, part.T, alpha=scale))
            score, index = scores.max(dim=1)
            better = score > best_score
            best_score, best = torch.where(better, score, best_score), torch.where(better, index + start, best)
        found.append(best)
    return torch.cat(found).reshape(batch, height, width)
