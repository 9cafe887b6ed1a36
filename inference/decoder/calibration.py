"""Which of several ways is fastest on this machine, by a short measurement: storage of matrices, number of threads."""

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
from inference.decoder.projection import Int8Projection, Plan, Precision, Way
from seq2seq import ImageTransformer

Name = TypeVar("Name")
MEASURED_BYTES = 48 * 1024 * 1024  # of matrices: more than a core's caches, so that streaming them is what is measured
SMALL_MATRIX = 256 * 1024  # numbers; below it the storage makes no difference worth a measurement
ROWS = (1, 2, 8, 16)  # a picture, a guided picture, a batch, a guided batch or a window
LEAST_FLIPPED = 16
NATIVE_ROWS = (8, 16, 32, 64)
Product = Callable[[Tensor, Tensor], Tensor]
Multiply = Callable[[Tensor], object]
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


def way_for(model: ImageTransformer, int8: bool) -> Way:
    """How the matrices of a decoder of this model should lie and be multiplied: measured for float32 models on the CPU."""
    table = model.image_embedding.weight
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return Way()
    width = model.config.width
    return fastest_way(width, 4 * width, torch.get_num_threads(), int8)


@lru_cache(maxsize=8)
def fastest_way(inputs: int, outputs: int, threads: int, int8: bool = False) -> Way:
    """How matrices [outputs, inputs], float32 or int8, should lie in memory and be multiplied with few rows. threads: torch's
    current count, which the answer is for.

    Compiled steps (`inference.decoder.native`) up to the most of NATIVE_ROWS that they are fastest for; where they are for none, the
    storage whose best times over ROWS, each against the best of all, add up to less.
    """
    if inputs * outputs < SMALL_MATRIX:
        return Way()
    generator = torch.Generator().manual_seed(0)
    count = max(2, MEASURED_BYTES // (4 * inputs * outputs))
    plain = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    with torch.inference_mode():
        way = _native_way(plain, int8, generator)
        return way if way.native_to or int8 else _storage(plain, generator)


def _native_way(plain: list[Tensor], int8: bool, generator: torch.Generator) -> Way:
    """By measuring compiled products against torch's, from the matrices [O, I]."""
    from inference.decoder.native.threads import library

    if library() is None:
        return Way()
    from inference.decoder.native.trial import products

    ways: dict[str, Multiply] = {name: partial(_each, plain, PRODUCTS[name]) for name in ("rows", "flipped")}
    matrices = plain
    if int8:
        rounded = [Int8Projection([_linear(matrix)], Plan(True, Way(), LargePages())) for matrix in plain]
        ways, matrices = {"rounded": lambda x: [projection(x) for projection in rounded]}, [part.matrix for part in rounded]
    native_to = 0
    for rows in NATIVE_ROWS:
        x = torch.randn(rows, plain[0].shape[1], generator=generator)
        native = products(matrices, x.to(torch.int16) if int8 else x)
        best, _ = fastest({"native": native, **{name: partial(way, x) for name, way in ways.items()}})
        if best != "native":
            return Way(native_to=native_to, flipped_from=rows if best == "flipped" else 0)
        native_to = rows
    return Way(native_to=native_to)


def _storage(plain: list[Tensor], generator: torch.Generator) -> Way:
    """By measuring torch's products with `plain` [O, I] and with their transposes."""
    columns = [matrix.t().contiguous() for matrix in plain]
    relative: dict[int, dict[str, float]] = {}
    for rows in ROWS:
        x = torch.randn(rows, plain[0].shape[1], generator=generator)
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


def _linear(weight: Tensor) -> nn.Linear:
    """A layer of this weight [O, I], without a bias."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _each(matrices: list[Tensor], multiply: Product, x: Tensor) -> None:
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


def _decoder(model: ImageTransformer, weights: Precision | None) -> CachedDecoder:
    """The model in this precision, taken over by a decoder whose matrices lie as is fastest here."""
    on_cpu = model.image_embedding.weight.device.type == "cpu"
    if weights == "bfloat16" or (weights == "int8" and not on_cpu):
        model.bfloat16()
    elif weights is not None:
        model.float()
    return CachedDecoder(model, int8=weights == "int8", way=way_for(model, weights == "int8"))
