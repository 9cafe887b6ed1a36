"""Order in which a run visits its items, and the random numbers of each visit.

Both are functions of (seed, epoch, item) alone. The epochs' permutations are laid end to end, and
step s of the run takes the next `batch_size` items. So the position in the data is the step,
resuming is exact, and the order is the same for any number of workers, processes and micro-batches.
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

GOLDEN_GAMMA = numpy.uint64(0x9E3779B97F4A7C15)  # SplitMix64's distance between two states
CHUNKS_PER_BUCKET = 16  # of data that has no chunks of its own


class ItemId(NamedTuple):
    """One visit of one item: its index in the data and the epoch of the visit."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides the tuple's own search, which nobody needs here


class ItemIds(Sequence[ItemId]):
    """Visits of a batch, as two arrays [B]: `epochs` and `indices`."""

    def __init__(self, epochs: numpy.ndarray, indices: numpy.ndarray) -> None:
        self.epochs = epochs
        self.indices = indices

    @staticmethod
    def from_sequence(items: Sequence[ItemId]) -> ItemIds:
        """Convert any sequence of visits."""
        if isinstance(items, ItemIds):
            return items
        # reshape for an empty list, whose array has one axis
        epochs, indices = numpy.array(items, dtype=numpy.int64).reshape(-1, 2).T
        return ItemIds(epochs, indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return ItemIds(self.epochs[place], self.indices[place])
        return ItemId(int(self.epochs[place]), int(self.indices[place]))

    def __iter__(self) -> Iterator[ItemId]:
        return map(ItemId, self.epochs.tolist(), self.indices.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def item_random(seed: int, item: ItemId, purpose: str) -> random.Random:
    """Return the random numbers of one visit for one purpose (flip, caption choice, ...)."""
    return random.Random(_key(f"{seed}/{item.epoch}/{item.index}/{purpose}"))


def visit_bits(seed: int, items: Sequence[ItemId], purpose: str) -> numpy.ndarray:
    """Return 64 random bits per visit, [B] uint64: `item_random` for batches, 100 times as fast.

    Counters through the finalizer of SplitMix64 (Steele et al. 2014), keyed by seed and purpose.
    """
    items = ItemIds.from_sequence(items)
    epochs = items.epochs.astype(numpy.uint64)
    indices = items.indices.astype(numpy.uint64)
    key = numpy.uint64(_key(f"{seed}/{purpose}"))

    # one round per counter: epoch and index in one sum would give many pairs the same bits
    epoch_bits = splitmix64(key + epochs * GOLDEN_GAMMA)
    return splitmix64(epoch_bits + indices * GOLDEN_GAMMA)


def splitmix64(numbers: numpy.ndarray) -> numpy.ndarray:
    """SplitMix64's finalizer, uint64 -> uint64: each input bit flips half the output."""
    numbers = (numbers ^ (numbers >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> numpy.uint64(31))


def uniform(bits: numpy.ndarray) -> numpy.ndarray:
    """Random bits uint64 -> numbers in [0, 1), float64."""
    return (bits >> numpy.uint64(11)) * 2.0**-53  # 53 bits, the mantissa of a float64


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _permutation(seed: int, length: int) -> numpy.ndarray:
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return torch.randperm(length, generator=generator).numpy()


class EpochOrder(NamedTuple):
    """Chunks of one epoch in shuffled order, grouped into buckets."""

    chunks: numpy.ndarray  # [chunks] their numbers, in the order in which they are visited
    first_chunks: numpy.ndarray  # [buckets + 1] where each bucket begins in `chunks`
    starts: numpy.ndarray  # [buckets] position in the epoch of each bucket's first row


class DataOrder:
    """Order in which a run visits `length` items: each once per epoch, shuffled anew every epoch.

    With `shuffle_rows` below `length`, the epoch visits chunks of neighbouring rows in random
    order, gathers them into buckets of at least `shuffle_rows` rows, and shuffles the rows of each
    bucket. Rows that are read at about the same time then lie together on disk, and no permutation
    of all rows is held in memory.

    chunk_bounds: first row of each of the data's own chunks (shards, row groups), then `length`.
    None makes 16 chunks per bucket.
    """

    def __init__(self, length: int, seed: int, shuffle_rows: int = 0,
                 chunk_bounds: Sequence[int] | None = None) -> None:
        self.length = length
        self.seed = seed
        whole = not 0 < shuffle_rows < length
        self.shuffle_rows = length if whole else shuffle_rows

        if whole:
            bounds = [0, length]
        elif chunk_bounds is not None:
            bounds = list(chunk_bounds)
        else:
            size = max(1, self.shuffle_rows // CHUNKS_PER_BUCKET)
            bounds = [*range(0, length, size), length]
        self._bounds = numpy.array(bounds, dtype=numpy.int64)
        self._make_caches()

    def _make_caches(self) -> None:
        # a batch may span two epochs and several small buckets
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        self._bucket_rows = lru_cache(maxsize=4)(self._make_bucket_rows)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_epoch_order"], state["_bucket_rows"]  # caches cannot be pickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_caches()

    def _make_epoch_order(self, epoch: int) -> EpochOrder:
        count = len(self._bounds) - 1
        if count > 1:
            chunks = _permutation(_key(f"{self.seed}/{epoch}/runs"), count)
        else:
            chunks = numpy.zeros(1, dtype=numpy.int64)
        sizes = self._bounds[chunks + 1] - self._bounds[chunks]
        positions = numpy.concatenate([[0], numpy.cumsum(sizes)])  # [chunks + 1], in the epoch

        first_chunks = [0]
        while True:
            # the bucket ends with the chunk in which it reaches shuffle_rows
            full = positions[first_chunks[-1]] + self.shuffle_rows
            following = int(numpy.searchsorted(positions, full))
            if following >= count:
                break
            first_chunks.append(following)
        return EpochOrder(chunks, numpy.array([*first_chunks, count]), positions[first_chunks])

    def _make_bucket_rows(self, epoch: int, bucket: int) -> numpy.ndarray:
        order = self._epoch_order(epoch)
        first, end = order.first_chunks[bucket: bucket + 2]
        chunks = order.chunks[first:end]
        rows = numpy.concatenate([self._chunk_rows(chunk) for chunk in chunks])

        if len(rows) == self.length:  # data that is shuffled as a whole
            # a factor above any number of epochs: no two seeds share an order
            return _permutation(self.seed * 1_000_003 + epoch, self.length)
        seed = _key(f"{self.seed}/{epoch}/{bucket}/rows")
        return rows[_permutation(seed, len(rows))]

    def _chunk_rows(self, chunk: int) -> numpy.ndarray:
        return numpy.arange(self._bounds[chunk], self._bounds[chunk + 1])

    def items(self, position: int, count: int) -> ItemIds:
        """Return `count` visits from a position on; they may go on into the next epochs."""
        epochs = numpy.empty(count, dtype=numpy.int64)
        indices = numpy.empty(count, dtype=numpy.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(position, self.length)
            starts = self._epoch_order(epoch).starts
            bucket = int(numpy.searchsorted(starts, offset, side="right")) - 1
            first = offset - int(starts[bucket])
            rows = self._bucket_rows(epoch, bucket)[first: first + count - done]

            end = done + len(rows)
            epochs[done:end] = epoch
            indices[done:end] = rows
            position += len(rows)
            done = end
        return ItemIds(epochs, indices)

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run must have in common, beyond length and seed."""
        if self.shuffle_rows == self.length:
            return {}
        # hashed, since a data set may have thousands of chunks
        chunks = _key(repr(self._bounds.tolist()))
        return {"data.shuffle_rows": self.shuffle_rows, "data.runs": f"{chunks:016x}"}

    def batch(self, step: int, batch_size: int) -> ItemIds:
        """Return the items of global batch `step`, in order; a batch may span two epochs."""
        return self.items(step * batch_size, batch_size)


class MicroBatches(Sampler[ItemIds]):
    """Micro-batches of this process from `first_step` up to `last_step`.

    A global batch is laid out as [accumulation, world, micro-batch], so that its items do not
    depend on how it is split.
    """

    def __init__(self, order: DataOrder, batch_size: int, accumulation: int, rank: int,
                 world_size: int, first_step: int, last_step: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[ItemIds]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.first_step, self.last_step):
            for part in range(self.accumulation):
                start = (part * self.world_size + self.rank) * micro
                yield self.order.items(step * self.batch_size + start, micro)
