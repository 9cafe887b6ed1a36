"""Which items make which batch, and the random numbers of a visit: functions of (seed, epoch, item) alone.

The epochs' permutations are laid end to end; step s of the run takes the next `batch_size` items. So the data position
is the step, resume is exact, and the order is the same for any number of workers, processes and micro-batches.
"""

# Axes: B batch

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import Sampler


class ItemId(NamedTuple):
    """One visit of one item: its index in the data and the epoch of the visit."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides the tuple's own search, which nobody needs here


class Items(Sequence[ItemId]):
    """Visits of a batch, as two arrays [B]: `epochs` and `indices`."""

    def __init__(self, epochs: numpy.ndarray, indices: numpy.ndarray) -> None:
        self.epochs, self.indices = epochs, indices

    @staticmethod
    def of(items: Sequence[ItemId]) -> Items:
        """Any sequence of visits."""
        if isinstance(items, Items):
            return items
        epochs, indices = numpy.array(items, dtype=numpy.int64).reshape(-1, 2).T
        return Items(epochs, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Items(self.epochs[place], self.indices[place])
        return ItemId(int(self.epochs[place]), int(self.indices[place]))

    def __iter__(self) -> Iterator[ItemId]:
        return map(ItemId, self.epochs.tolist(), self.indices.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def item_random(seed: int, item: ItemId, purpose: str) -> random.Random:
    """The random numbers of one visit for one purpose (augmentation, caption choice, ...)."""
    return random.Random(_key(f"{seed}/{item.epoch}/{item.index}/{purpose}"))


def visit_bits(seed: int, items: Sequence[ItemId], purpose: str) -> numpy.ndarray:
    """64 random bits of each visit, [B] uint64: `item_random` for whole batches, a hundred times as fast.

    Counters through the finalizer of SplitMix64 (Steele et al. 2014), keyed by seed and purpose.
    """
    items = Items.of(items)
    key = numpy.uint64(_key(f"{seed}/{purpose}"))
    return mix(mix(key + items.epochs.astype(numpy.uint64) * STEP) + items.indices.astype(numpy.uint64) * STEP)


def mix(numbers: numpy.ndarray) -> numpy.ndarray:
    """SplitMix64's finalizer: uint64 -> uint64, one to one, every bit of the input flips half of the output's."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> numpy.uint64(31))


def uniform(bits: numpy.ndarray) -> numpy.ndarray:
    """Random bits uint64 -> numbers in [0, 1), float64."""
    return (bits >> numpy.uint64(11)) * 2.0**-53


STEP = numpy.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's distance between two states."""


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class DataOrder:
    """The order in which a run visits `length` items: each once an epoch, shuffled anew in every epoch.

    With `shuffle_rows` less than `length`, rows are shuffled together by so many: the epoch visits runs of neighbouring rows
    in random order, takes as many of them as make a bucket of `shuffle_rows`, and shuffles each bucket's rows. What is read at
    a time then lies together on disk, and no permutation of all rows is held. `runs`: where the data's own runs begin (shards,
    row groups), ending with `length`; without them a bucket is made of 16.
    """

    def __init__(self, length: int, seed: int, shuffle_rows: int = 0, runs: Sequence[int] | None = None) -> None:
        self.length, self.seed = length, seed
        whole = not 0 < shuffle_rows < length
        self.shuffle_rows = length if whole else shuffle_rows
        size = max(1, self.shuffle_rows // 16)
        bounds = [0, length] if whole else [*range(0, length, size), length] if runs is None else list(runs)
        self._runs = numpy.array(bounds, dtype=numpy.int64)
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._bucket = lru_cache(maxsize=4)(self._make_bucket)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_plan", "_bucket")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._bucket = lru_cache(maxsize=4)(self._make_bucket)

    def _make_plan(self, epoch: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """The runs in the epoch's order, the first run of each bucket, and the position of its first row."""
        count = len(self._runs) - 1
        runs = _permutation(_key(f"{self.seed}/{epoch}/runs"), count) if count > 1 else numpy.zeros(1, dtype=numpy.int64)
        ends = numpy.cumsum(self._runs[runs + 1] - self._runs[runs])
        first = [0]
        while True:  # as many runs as it takes to reach shuffle_rows
            begin = ends[first[-1] - 1] if first[-1] else 0
            after = int(numpy.searchsorted(ends, begin + self.shuffle_rows)) + 1
            if after >= count:
                break
            first.append(after)
        starts = numpy.array([ends[run - 1] if run else 0 for run in first], dtype=numpy.int64)
        return runs, numpy.array([*first, count]), starts

    def _make_bucket(self, epoch: int, bucket: int) -> numpy.ndarray:
        runs, first, _ = self._plan(epoch)
        inside = runs[first[bucket]: first[bucket + 1]]
        rows = numpy.concatenate([numpy.arange(self._runs[run], self._runs[run + 1]) for run in inside])
        if len(rows) == self.length:
            return _permutation((self.seed * 1_000_003 + epoch) % (1 << 63), self.length)
        return rows[_permutation(_key(f"{self.seed}/{epoch}/{bucket}/rows"), len(rows))]

    def items(self, position: int, count: int) -> Items:
        """The visits from a position on; they may go on into the next epochs."""
        epochs, indices = numpy.empty(count, dtype=numpy.int64), numpy.empty(count, dtype=numpy.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(position, self.length)
            starts = self._plan(epoch)[2]
            bucket = int(numpy.searchsorted(starts, offset, side="right")) - 1
            begin = offset - int(starts[bucket])
            rows = self._bucket(epoch, bucket)[begin: begin + count - done]
            epochs[done: done + len(rows)], indices[done: done + len(rows)] = epoch, rows
            position, done = position + len(rows), done + len(rows)
        return Items(epochs, indices)

    def facts(self) -> dict[str, Any]:
        """What a run that goes on must have alike, beyond length and seed."""
        if self.shuffle_rows == self.length:
            return {}
        return {"data.shuffle_rows": self.shuffle_rows, "data.runs": f"{_key(repr(self._runs.tolist())):016x}"}

    def batch(self, step: int, batch_size: int) -> Items:
        """The items of global batch `step`, in order; a batch may span two epochs."""
        return self.items(step * batch_size, batch_size)


def _permutation(seed: int, length: int) -> numpy.ndarray:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed % (1 << 63))).numpy()


class MicroBatches(Sampler[Items]):
    """This process's micro-batches from `first_step` to `last_step`: [accumulation x world x micro] of each global batch."""

    def __init__(self, order: DataOrder, batch_size: int, accumulation: int, rank: int, world_size: int, first_step: int,
                 last_step: int) -> None:
        self.order, self.batch_size, self.accumulation = order, batch_size, accumulation
        self.rank, self.world_size, self.first_step, self.last_step = rank, world_size, first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[Items]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.first_step, self.last_step):
            for part in range(self.accumulation):
                start = (part * self.world_size + self.rank) * micro
                yield self.order.items(step * self.batch_size + start, micro)


