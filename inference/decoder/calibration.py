"""Choose the fastest of several implementations on this machine: matrix storage, thread count."""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.large_pages import LargePages
from inference.decoder.projection import Int8Projection, MatmulStrategy, Precision, WeightStorage
from seq2seq import ImageTransformer

Name = TypeVar("Name")
MEASURED_BYTES = 48 * 1024 * 1024  # of matrices: more than caches hold, so that memory is measured
SMALL_MATRIX = 256 * 1024  # entries; for smaller ones the storage makes no measurable difference
ROWS = (1, 2, 8, 16)  # an image, a guided image, a batch, a guided batch or a Jacobi window
LEAST_FLIPPED = 16
NATIVE_ROWS = (8, 16, 32, 64)
Product = Callable[[Tensor, Tensor], Tensor]
Multiply = Callable[[Tensor], object]
PRODUCTS: dict[str, Product] = {
    "rows": lambda matrix, x: torch.mm(x, matrix.t()),
    "columns": lambda matrix, x: torch.mm(x, matrix),
    "vector": lambda matrix, x: torch.mv(matrix, x[0]),
    "flipped": lambda matrix, x: torch.mm(matrix, x.t()).t().contiguous(),
}
"""Products of a matrix [O, I] and rows x [M, I]; `columns` takes the matrix transposed."""


def fastest(candidates: Mapping[Name, Callable[[], object]], repeats: int = 5,
            clock: Callable[[], float] = time.perf_counter) -> tuple[Name, dict[Name, float]]:
    """Return the candidate with the least median time and all medians in seconds.

    Candidates alternate, after one warm-up run each, so that a machine that slows down slows all of
    them.
    """
    for candidate in candidates.values():
        candidate()

    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            seconds[name].append(clock() - start)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return min(medians, key=lambda name: medians[name]), medians


def matmul_strategy_for(model: ImageTransformer, int8: bool) -> MatmulStrategy:
    """Return a model's strategy: the fastest for float32 on the CPU, else torch's default."""
    table = model.image_embedding.weight
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return MatmulStrategy()
    width = model.config.width
    return fastest_strategy(width, 4 * width, torch.get_num_threads(), int8)


@lru_cache(maxsize=8)
def fastest_strategy(inputs: int, outputs: int, threads: int, int8: bool = False) -> MatmulStrategy:
    """Measure strategies for few rows times matrices [outputs, inputs], float32 or int8.

    threads: torch's current thread count, a key of the cache. Compiled steps
        (`inference.decoder.native`) are chosen up to the most of NATIVE_ROWS for which they win. If
        they win for none, the storage wins whose best times over ROWS, each relative to the overall
        best, have the smaller sum.
    """
    if inputs * outputs < SMALL_MATRIX:
        return MatmulStrategy()

    generator = torch.Generator().manual_seed(0)
    count = max(2, MEASURED_BYTES // (4 * inputs * outputs))
    matrices = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    with torch.inference_mode():
        strategy = _native_strategy(matrices, int8, generator)
        if strategy.native_to or int8:
            return strategy
        return _storage_strategy(matrices, generator)


def _native_strategy(matrices: list[Tensor], int8: bool,
                     generator: torch.Generator) -> MatmulStrategy:
    """Measure compiled products against torch's, for matrices [O, I] or their int8 roundings."""
    from inference.decoder.native.threads import library

    if library() is None:
        return MatmulStrategy()
    from inference.decoder.native.trial import products

    torch_products: dict[str, Multiply]
    if int8:
        storage = WeightStorage(True, MatmulStrategy(), LargePages())
        rounded = [Int8Projection([_linear(matrix)], storage) for matrix in matrices]
        torch_products = {"rounded": lambda x: [projection(x) for projection in rounded]}
        native_matrices = [projection.matrix for projection in rounded]
    else:
        torch_products = {"rows": partial(_multiply_all, matrices, PRODUCTS["rows"]),
                          "flipped": partial(_multiply_all, matrices, PRODUCTS["flipped"])}
        native_matrices = matrices

    native_to = 0
    for rows in NATIVE_ROWS:
        x = torch.randn(rows, matrices[0].shape[1], generator=generator)
        candidates = {name: partial(multiply, x) for name, multiply in torch_products.items()}
        native = products(native_matrices, x.to(torch.int16) if int8 else x)
        best, _ = fastest({"native": native, **candidates})
        if best != "native":
            flipped_from = rows if best == "flipped" else 0
            return MatmulStrategy(native_to=native_to, flipped_from=flipped_from)
        native_to = rows
    return MatmulStrategy(native_to=native_to)


def _storage_strategy(matrices: list[Tensor], generator: torch.Generator) -> MatmulStrategy:
    """Measure torch's products with matrices [O, I] and with their transposes."""
    transposed = [matrix.t().contiguous() for matrix in matrices]
    relative: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        x = torch.randn(rows, matrices[0].shape[1], generator=generator)
        candidates = {}
        for name, multiply in PRODUCTS.items():
            if (name == "vector" and rows > 1) or (name == "flipped" and rows < LEAST_FLIPPED):
                continue
            stored = transposed if name == "columns" else matrices
            candidates[name] = partial(_multiply_all, stored, multiply, x)

        best, medians = fastest(candidates)
        relative[rows] = {name: median / medians[best] for name, median in medians.items()}
    return _choose_storage(relative)


def _choose_storage(relative: dict[int, dict[str, float]]) -> MatmulStrategy:
    """Choose by the time of each product, per number of rows, relative to the fastest product."""
    total_rows = total_columns = 0.0
    for times in relative.values():
        total_rows += min(time for name, time in times.items() if name != "columns")
        total_columns += times["columns"]
    if total_columns < total_rows:
        return MatmulStrategy("columns")

    vector = relative[1]["vector"] < relative[1]["rows"]
    flipped = [rows for rows, times in relative.items()
               if times.get("flipped", math.inf) < times["rows"]]
    return MatmulStrategy("rows", vector, min(flipped, default=0))


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer with this weight [O, I] and no bias."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _multiply_all(matrices: list[Tensor], multiply: Product, x: Tensor) -> None:
    for matrix in matrices:
        multiply(matrix, x)


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """Return the fastest thread count for `step` (1, 2, 4, ... or `most`); torch keeps it."""
    powers_of_two = [1 << power for power in range(most.bit_length())]
    counts = sorted({*powers_of_two, most})

    def with_threads(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            step()
            step()
        return run

    best, _ = fastest({count: with_threads(count) for count in counts})
    torch.set_num_threads(best)
    return best


def build_decoder(model: ImageTransformer, weights: Precision | None) -> CachedDecoder:
    """Cast the model (None: leave it as it is) and build its decoder with the fastest strategy."""
    int8 = weights == "int8"
    on_cpu = model.image_embedding.weight.device.type == "cpu"
    if weights == "bfloat16" or (int8 and not on_cpu):
        model.bfloat16()
    elif weights is not None:
        model.float()
    return CachedDecoder(model, int8=int8, matmul=matmul_strategy_for(model, int8))
