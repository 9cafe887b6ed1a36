"""Which of several ways is fastest on this machine, by a short measurement: storage of matrices, number of threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TypeVar

import torch

from inference.projection import Storage

Name = TypeVar("Name")
MEASURED_BYTES = 48 * 1024 * 1024  # of matrices: more than a core's caches, so that streaming them is what is measured
SMALL_MATRIX = 256 * 1024  # numbers; below it the storage makes no difference worth a measurement
ROWS = (1, 2, 8)  # a picture, a guided picture, a batch


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
def fastest_storage(inputs: int, outputs: int, threads: int) -> Storage:
    """How float32 matrices [outputs, inputs] should lie in memory for few rows at a time: the storage whose times over 1, 2
    and 8 rows, each against the better one's, add up to less. threads: torch's current count, which the answer is for."""
    if inputs * outputs < SMALL_MATRIX:
        return "rows"
    count = max(2, MEASURED_BYTES // (4 * inputs * outputs))
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(outputs, inputs, generator=generator).t() for _ in range(count)]
    stored: dict[Storage, list[torch.Tensor]] = {"rows": plain, "columns": [matrix.contiguous() for matrix in plain]}
    total = dict.fromkeys(stored, 0.0)
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=generator)
            best, medians = fastest({name: partial(_multiply, x, matrices) for name, matrices in stored.items()})
            for name, median in medians.items():
                total[name] += median / medians[best]
    return min(total, key=lambda name: total[name])


def _multiply(x: torch.Tensor, matrices: list[torch.Tensor]) -> None:
    for matrix in matrices:
        torch.mm(x, matrix)


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
