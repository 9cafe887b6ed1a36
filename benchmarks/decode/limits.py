"""What this machine could do at best, measured in the run that it is compared with: reading weights, multiplying them.

A step cannot take less time than reading every weight and every cached key and value once, nor than its multiplications. The
fraction of the limit is that time divided by the step's own; 1 would be a machine that does nothing else.
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

STREAMED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
REPEATS = 7


class Limits(NamedTuple):
    """Bytes read a second; floating-point operations (multiply and add are two) a second in the dtype of the weights."""

    bytes_per_s: float
    flops_per_s: float


def measure_limits(device: str, dtype: str) -> Limits:
    """Bandwidth by summing an array that no cache holds, rate by the product of two square matrices; medians."""
    array = torch.ones(STREAMED_BYTES[device] // 4, device=device)
    side, number = MATRIX_SIDE[device], harness.DTYPES[dtype]
    matrix = torch.randn(side, side, device=device).to(number)
    streaming = _median(lambda: array.sum(), device)
    multiplying = _median(lambda: matrix @ matrix, device)
    return Limits(array.nbytes / streaming, 2 * side**3 / multiplying)


def _median(run: Callable[[], object], device: str) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        harness.synchronize(device)
        start = time.perf_counter()
        run()
        harness.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class StepCost(NamedTuple):
    """Of one decoder step, the mean over a picture: bytes that must be read once, floating-point operations."""

    bytes: float
    flops: float

    def seconds(self, limits: Limits) -> float:
        """The least time that it can take."""
        return max(self.bytes / limits.bytes_per_s, self.flops / limits.flops_per_s)


def step_cost(decoder: CachedDecoder, rows: int, tokens: int, text_slots: int) -> StepCost:
    """Of `rows` rows that draw `tokens` tokens and read `text_slots` slots of a caption across (0 where they do not)."""
    config = decoder.config
    projections = [decoder.to_logits]
    for attend, cross, feed in decoder.layers:
        projections += [attend.qkv, attend.out, feed.up, feed.out, *([] if cross is None else [cross.query, cross.out])]
    matrices = sum(projection.matrix.numel() for projection in projections)
    stored = sum(part.nbytes for projection in projections for part in (projection.matrix, projection.scale_127)
                 if part is not None)
    slots = decoder.model.prefix_slots + (tokens + 1) / 2 + text_slots  # that a row reads, on average
    per_slot = 2 * len(decoder.layers) * decoder.kv_heads * config.head_dim
    attention = 4 * len(decoder.layers) * config.heads * config.head_dim * slots  # scores, and their sum of values
    number = decoder.model.image_embedding.weight.element_size()
    return StepCost(stored + rows * slots * per_slot * number, rows * (2 * matrices + attention))
