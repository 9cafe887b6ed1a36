"""Choose the fastest of several implementations on this machine: matrix storage, thread count.

Choices are kept on disk (`choices`). One that is not there is measured when it is needed, which may
take a second per process in all; `tokenloom calibrate` measures without a limit.
"""

# Axes: M rows, I inputs, O outputs

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.choices import (
    NATIVE_ROWS,
    ROWS,
    keep,
    kept_strategy,
    kept_threads,
    strategy_key,
)
from inference.decoder.large_pages import LargePages
from inference.decoder.projection import Int8Projection, MatmulStrategy, Precision, WeightStorage
from inference.decoder.timing import Budget, fastest
from seq2seq import ImageTransformer

PROCESS_BUDGET = Budget(1.0)
"""What a process may spend on measuring in all, strategies and thread counts together."""
MEASURED_BYTES = 48 * 1024 * 1024  # of matrices: more than caches hold, so that memory is measured
SMALL_MATRIX = 256 * 1024  # entries; for smaller ones the storage makes no measurable difference
LEAST_FLIPPED = 16
Product = Callable[[Tensor, Tensor], Tensor]
Multiply = Callable[[Tensor], object]
Step = Callable[[], object]
PRODUCTS: dict[str, Product] = {
    "rows": lambda matrix, x: torch.mm(x, matrix.t()),
    "columns": lambda matrix, x: torch.mm(x, matrix),
    "vector": lambda matrix, x: torch.mv(matrix, x[0]),
    "flipped": lambda matrix, x: torch.mm(matrix, x.t()).t().contiguous(),
}
"""Products of a matrix [O, I] and rows x [M, I]; `columns` takes the matrix transposed."""


# ---- matrix products


class MeasuredStrategy(NamedTuple):
    """A strategy, and what it was chosen by: median seconds by rows, then by product."""

    strategy: MatmulStrategy
    seconds: dict[int, dict[str, float]]


def matmul_strategy_for(model: ImageTransformer, int8: bool) -> MatmulStrategy:
    """Return a model's strategy: the fastest for float32 on the CPU, else torch's default."""
    table = model.image_embedding.weight
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return MatmulStrategy()
    width = model.config.width
    return fastest_strategy(width, 4 * width, torch.get_num_threads(), int8)


@lru_cache(maxsize=8)
def fastest_strategy(inputs: int, outputs: int, threads: int, int8: bool) -> MatmulStrategy:
    """Return the strategy for few rows times matrices [outputs, inputs], float32 or int8.

    It is measured if it is not kept on disk. threads: torch's current thread count, a key.
    """
    if inputs * outputs < SMALL_MATRIX:
        return MatmulStrategy()
    key = strategy_key(inputs, outputs, threads, int8)
    kept = kept_strategy(key)
    if kept is not None:
        return kept

    measured = measure_strategy(inputs, outputs, int8, PROCESS_BUDGET)
    if measured is None:
        return _unmeasured_strategy()
    keep(key, measured.strategy, thorough=False)
    return measured.strategy


def measure_strategy(inputs: int, outputs: int, int8: bool,
                     budget: Budget) -> MeasuredStrategy | None:
    """Measure strategies with torch's current threads; None if the budget ends before one is known.

    Compiled steps (`inference.decoder.native`) are chosen up to the most of NATIVE_ROWS for which
    they win. If they win for none, the storage wins whose best times over ROWS, each relative to
    the overall best, have the smaller sum.
    """
    if budget.is_spent:
        return None
    if _has_native():
        # compiling is not measuring: its result is kept by the compiler, and needed anyway
        from inference.decoder.native.trial import trial_function

        trial_function(int8)

    generator = torch.Generator().manual_seed(0)
    count = max(2, MEASURED_BYTES // (4 * inputs * outputs))
    with torch.inference_mode(), budget.spending():
        # one matrix's numbers in many places: drawing all of them would take as long as measuring
        first = torch.randn(outputs, inputs, generator=generator)
        matrices = [first, *(first.clone() for _ in range(count - 1))]
        measured = _native_strategy(matrices, int8, generator, budget)
        if measured is None or measured.strategy.native_to or int8:
            return measured
        return _storage_strategy(matrices, generator, budget)


def _has_native() -> bool:
    from inference.decoder.native.threads import library

    return library() is not None


def _unmeasured_strategy() -> MatmulStrategy:
    """Return what is mostly the fastest for one image: compiled steps where they exist."""
    return MatmulStrategy(native_to=NATIVE_ROWS[0] if _has_native() else 0)


def _repeats(budget: Budget) -> int:
    """Return how often each candidate is timed: with little time, more sizes rather than runs."""
    return 5 if budget.seconds is None else 2


def _native_strategy(matrices: list[Tensor], int8: bool, generator: torch.Generator,
                     budget: Budget) -> MeasuredStrategy | None:
    """Measure compiled products against torch's, for matrices [O, I] or their int8 roundings."""
    if not _has_native():
        return MeasuredStrategy(MatmulStrategy(), {})
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
    seconds: dict[int, dict[str, float]] = {}
    for rows in NATIVE_ROWS:
        x = torch.randn(rows, matrices[0].shape[1], generator=generator)
        candidates = {name: partial(multiply, x) for name, multiply in torch_products.items()}
        native = products(native_matrices, x.to(torch.int16) if int8 else x)
        timed = fastest({"native": native, **candidates}, budget, _repeats(budget))
        if timed is None:
            break  # what is known so far counts
        best, seconds[rows] = timed
        if best != "native":
            flipped_from = rows if best == "flipped" else 0
            strategy = MatmulStrategy(native_to=native_to, flipped_from=flipped_from)
            return MeasuredStrategy(strategy, seconds)
        native_to = rows
    return MeasuredStrategy(MatmulStrategy(native_to=native_to), seconds) if seconds else None


def _storage_strategy(matrices: list[Tensor], generator: torch.Generator,
                      budget: Budget) -> MeasuredStrategy | None:
    """Measure torch's products with matrices [O, I] and with their transposes."""
    transposed = [matrix.t().contiguous() for matrix in matrices]
    seconds: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        x = torch.randn(rows, matrices[0].shape[1], generator=generator)
        candidates = {}
        for name, multiply in PRODUCTS.items():
            if (name == "vector" and rows > 1) or (name == "flipped" and rows < LEAST_FLIPPED):
                continue
            stored = transposed if name == "columns" else matrices
            candidates[name] = partial(_multiply_all, stored, multiply, x)

        timed = fastest(candidates, budget, _repeats(budget))
        if timed is None:
            return None
        _, seconds[rows] = timed
    return MeasuredStrategy(_choose_storage(seconds), seconds)


def _choose_storage(seconds: dict[int, dict[str, float]]) -> MatmulStrategy:
    """Choose by the time of each product, per number of rows, relative to the fastest product."""
    total_rows = total_columns = 0.0
    for times in seconds.values():
        best = min(times.values())
        total_rows += min(time for name, time in times.items() if name != "columns") / best
        total_columns += times["columns"] / best
    if total_columns < total_rows:
        return MatmulStrategy("columns")

    vector = seconds[1]["vector"] < seconds[1]["rows"]
    flipped = [rows for rows, times in seconds.items()
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


# ---- threads


def fastest_threads(make_step: Callable[[], Step], most: int, key: str) -> int:
    """Return the fastest thread count for a step, up to `most`; torch keeps it.

    It is measured if none is kept on disk by `key`; if there is no time for that, it is `most`.
    """
    chosen = kept_threads(key, most)
    if chosen is None:
        chosen = most
        seconds = measure_threads(make_step, most, PROCESS_BUDGET)
        if seconds is not None:
            chosen = min(seconds, key=lambda count: seconds[count])
            keep(key, chosen, thorough=False)
    torch.set_num_threads(chosen)
    return chosen


def thread_counts(most: int) -> list[int]:
    """Return the counts that are tried: 1, 2, 4, ... and `most`."""
    powers_of_two = [1 << power for power in range(most.bit_length())]
    return sorted({*powers_of_two, most})


def measure_threads(make_step: Callable[[], Step], most: int,
                    budget: Budget) -> dict[int, float] | None:
    """Return the seconds of two steps by thread count.

    None if the budget ends too early. Torch is left with one of these counts.
    """
    if budget.is_spent:
        return None
    with budget.spending():
        step = make_step()

    def with_threads(count: int) -> Step:
        def run() -> None:
            torch.set_num_threads(count)
            step()
            step()
        return run

    timed = fastest({count: with_threads(count) for count in thread_counts(most)}, budget)
    return None if timed is None else timed[1]


# ---- the decoder


def build_decoder(model: ImageTransformer, weights: Precision | None) -> CachedDecoder:
    """Cast the model (None: leave it as it is) and build its decoder with the fastest strategy."""
    int8 = weights == "int8"
    on_cpu = model.image_embedding.weight.device.type == "cpu"
    if weights == "bfloat16" or (int8 and not on_cpu):
        model.bfloat16()
    elif weights is not None:
        model.float()
    return CachedDecoder(model, int8=int8, matmul=matmul_strategy_for(model, int8))
