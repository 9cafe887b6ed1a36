"""Which of several ways is fastest on this machine, by a short measurement: storage of matrices, number of threads."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TypeVar

import torch

from inference.projection import Way

Name = TypeVar("Name")
MEASURED_BYTES = 48 * 1024 * 1024  # of matrices: more than a core's caches, so that streaming them is what is measured
SMALL_MATRIX = 256 * 1024  # numbers; below it the storage makes no difference worth a measurement
ROWS = (1, 2, 8, 16)  # a picture, a guided picture, a batch, a guided batch or a window
LEAST_FLIPPED = 16
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PRODUCTS: dict[str, Product] = {
    "rows": lambda matrix, x: torch.mm(x, matrix.t()), "columns": lambda matrix, x: torch.mm(x, matrix),
    "vector": lambda matrix, x: torch.mv(matrix, x[0]), "flipped": lambda matrix, x: torch.mm(matrix, x.t()).t().contiguous()}
"""Ways to multiply rows x with a matrix; `columns` takes it transposed."""


def fastest(candidates: Mapping[Name, Callable[[], object]], repeats: int = 5,
            clock: Callable[[], float] = time.perf_counter) -> tuple[Name, dict[Name, float]]:
    """The candidate with the least median time, and all medians in seconds; they take turns, after one run each."""
    taken: dict[Name, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = clock()
            candidate()
            taken[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return min(medians, key=lambda name: medians[name]), medians


@lru_cache(maxsize=8)
def fastest_way(inputs: int, outputs: int, threads: int) -> Way:
    """How float32 matrices [outputs, inputs] should lie in memory and be multiplied with few rows: the storage whose best times
    over ROWS, each against the best of all, add up to less. threads: torch's current count, which the answer is for."""
    if inputs * outputs < SMALL_MATRIX:
        return Way()
    generator = torch.Generator().manual_seed(0)
    count = max(2, MEASURED_BYTES // (4 * inputs * outputs))
    plain = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    columns = [matrix.t().contiguous() for matrix in plain]
    relative: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator)
            ways = {name: partial(_each, columns if name == "columns" else plain, multiply, x)
                    for name, multiply in PRODUCTS.items()
                    if (name != "vector" or rows == 1) and (name != "flipped" or rows >= LEAST_FLIPPED)}
            best, medians = fastest(ways)
            relative[rows] = {name: median / medians[best] for name, median in medians.items()}
    return _chosen(relative)


def _chosen(relative: dict[int, dict[str, float]]) -> Way:
    """From the time of each way, by rows, as a multiple of the fastest one's."""
    with_rows = sum(min(time for name, time in times.items() if name != "columns") for times in relative.values())
    if sum(times["columns"] for times in relative.values()) < with_rows:
        return Way("columns")
    flipped = [rows for rows, times in relative.items() if times.get("flipped", math.inf) < times["rows"]]
    return Way("rows", relative[1]["vector"] < relative[1]["rows"], min(flipped, default=0))


def _each(matrices: list[torch.Tensor], multiply: Product, x: torch.Tensor) -> None:
    for matrix in matrices:
        multiply(matrix, x)


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """The number of threads, of 1, 2, 4, ... and `most`, with which `step` takes least time. Leaves torch's count at it."""
    counts = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power <= most), most})

    def with_threads(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            step()
            step()
        return run

    best, _ = fastest({count: with_threads(count) for count in counts})
    torch.set_num_threads(best)
    return best
