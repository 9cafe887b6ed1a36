"""Small quantizers of every kind and the latents that tests feed them.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size, n latents (= B*h*w).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers import Quantized, Quantizer, build_quantizer
from tokenizer_image.quantizers.residual import ResidualQuantizer
from tokenizer_image.quantizers.vector import VectorQuantizer

RAW_SEARCH = {"raw_search": True, "learn_codebook_by_gradient": True, "kmeans_init": False,
              "dead_code_fraction": 0.0}
CASES: dict[str, tuple[int, int, dict]] = {  # D, K, options
    "vq": (4, 32, {}),
    "vq-euclidean": (4, 32, {"l2_normalize": False}),
    "vq-gradient": (4, 32, {"learn_codebook_by_gradient": True}),
    "vq-gradient-euclidean": (4, 32, {"learn_codebook_by_gradient": True, "l2_normalize": False}),
    "residual": (4, 16, {"kind": "residual", "depth": 3}),
    "residual-gradient": (
        4, 16, {"kind": "residual", "depth": 2, "learn_codebook_by_gradient": True}),
    "fsq": (3, 60, {"kind": "fsq", "levels": (3, 4, 5)}),
    "lfq": (4, 16, {"kind": "lfq"}),
    "lfq-spherical": (5, 32, {"kind": "lfq", "spherical": True}),
    "simvq": (4, 32, {"kind": "simvq"}),
    "raw-search": (4, 32, RAW_SEARCH),
    "gumbel": (4, 32, {"kind": "gumbel"}),
}
LEARNED = [name for name in CASES if name.startswith(("vq", "residual"))]
SEARCHED = [*LEARNED, "simvq", "raw-search", "gumbel"]


def make(case: str, **changes) -> Quantizer:
    """Build the untrained quantizer of a case, with options changed."""
    dim, size, options = CASES[case]
    torch.manual_seed(0)
    return build_quantizer(dim, size, QuantizerConfig(**{**options, **changes}))


def latents_for(quantizer: Quantizer, batch: int = 4, side: int = 8, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, quantizer.dim, side, side, generator=generator)


def started(case: str, **changes) -> Quantizer:
    """Build a quantizer and give it two training batches; in eval mode."""
    quantizer = make(case, **changes).train()
    for seed in (11, 12):
        quantizer(latents_for(quantizer, seed=seed))
    return quantizer.eval()


def set_codes(quantizer: VectorQuantizer, values: list[list[float]]) -> None:
    book = quantizer.vq._codebook
    book.embed.data[0] = torch.tensor(values)
    book.embed_avg[0] = torch.tensor(values)
    book.initted.fill_(True)


def as_map(rows: list[list[float]]) -> torch.Tensor:
    """Latents [n, D] -> those of one image [1, D, 1, n]."""
    return torch.tensor(rows).T[None, :, None].contiguous()


def as_rows(latents: torch.Tensor) -> np.ndarray:
    """[B, D, h, w] -> [n, D]."""
    return latents.detach().double().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).numpy()


def brute_force(quantizer: Quantizer, latents: torch.Tensor) -> np.ndarray:
    """Return the nearest code of each latent in float64, the lowest on ties [n, depth]."""
    if quantizer.config.kind == "gumbel":
        weight = quantizer.proj.weight[:, :, 0, 0].detach().double().numpy()
        bias = quantizer.proj.bias.detach().double().numpy()
        return (as_rows(latents) @ weight.T + bias).argmax(axis=1)[:, None]
    layers = list(quantizer.layers) if isinstance(quantizer, ResidualQuantizer) else [quantizer]
    left, codes = as_rows(latents), []
    for layer in layers:
        raw = layer.config.raw_search
        book = (layer.vq.codebook if raw else layer.codebook).detach().double().numpy()
        on_sphere = layer.config.kind == "vq" and layer.config.l2_normalize and not raw
        z = left / np.linalg.norm(left, axis=1, keepdims=True) if on_sphere else left
        codes.append(((z[:, None] - book[None]) ** 2).sum(axis=2).argmin(axis=1))
        left = left - book[codes[-1]]
    return np.stack(codes, axis=1)


def total_loss(result: Quantized) -> torch.Tensor:
    return sum((part.value * part.weight for part in result.losses.values()), torch.zeros(()))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
