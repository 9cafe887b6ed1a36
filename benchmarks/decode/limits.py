"""Limits of this machine, measured in the same run: rates of reading weights and multiplying.

A step can take no less time than reading every weight and every cached key and value once, nor than
its multiplications. The fraction of the limit is that time divided by the step's own; 1 would be a
machine that does nothing else.
"""

# Axes: R rows, D width

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import harness
from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import Projection

STREAMED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 7


class Limits(NamedTuple):
    """Bytes read and floating-point operations (multiply and add are two) per second."""

    bytes_per_s: float
    flops_per_s: float


def measure_limits(device: str, dtype: str) -> Limits:
    """Measure bandwidth by summing a large array, FLOPs by the product of square matrices."""
    array = torch.ones(STREAMED_BYTES[device] // 4, device=device)  # larger than any cache
    side = MATRIX_SIDE[device]
    matrix = torch.randn(side, side, device=device).to(harness.DTYPES[dtype])
    streaming = _median_seconds(lambda: array.sum(), device)
    multiplying = _median_seconds(lambda: matrix @ matrix, device)
    return Limits(array.nbytes / streaming, 2 * side**3 / multiplying)


def _median_seconds(run: Callable[[], object], device: str) -> float:
    run()  # warm-up
    seconds = []
    for _ in range(REPEATS):
        harness.synchronize(device)
        start = time.perf_counter()
        run()
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class StepCost(NamedTuple):
    """Cost of a decoder step, the mean over an image: bytes to read, floating-point operations."""

    bytes: float
    flops: float

    def seconds(self, limits: Limits) -> float:
        """Least time that the step can take."""
        return max(self.bytes / limits.bytes_per_s, self.flops / limits.flops_per_s)


def step_cost(decoder: CachedDecoder, rows: int, tokens: int, text_slots: int) -> StepCost:
    """Cost of a step of `rows` rows that sample `tokens` tokens.

    text_slots: slots of a caption that each row reads by cross-attention; 0 without it.
    """
    projections = _step_projections(decoder)
    matrix_numbers = sum(projection.matrix.numel() for projection in projections)
    matrix_bytes = sum(_stored_bytes(projection) for projection in projections)

    # position t reads t + 1 slots of the image, (tokens + 1) / 2 on average
    slots = decoder.model.prefix_slots + (tokens + 1) / 2 + text_slots
    layers, head_dim = len(decoder.layers), decoder.config.head_dim
    cached_numbers = 2 * layers * decoder.kv_heads * head_dim  # keys and values per slot
    cached_bytes = slots * cached_numbers * decoder.model.image_embedding.weight.element_size()
    attention = 4 * layers * decoder.config.heads * head_dim * slots  # scores, sums of values
    return StepCost(matrix_bytes + rows * cached_bytes, rows * (2 * matrix_numbers + attention))


def _step_projections(decoder: CachedDecoder) -> list[Projection]:
    """The matrices that every step reads: all but those for keys and values of captions."""
    projections = [decoder.to_logits]
    for attention, cross, feedforward in decoder.layers:
        projections += [attention.qkv, attention.out, feedforward.up, feedforward.out]
        if cross is not None:
            projections += [cross.query, cross.out]
    return projections


def _stored_bytes(projection: Projection) -> int:
    scale = projection.scale_127
    return projection.matrix.nbytes + (0 if scale is None else scale.nbytes)
