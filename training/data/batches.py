"""Which items make which batch: a function of (seed, step) alone.

The epochs' permutations are laid end to end; step s of the run takes the next `batch_size` items. So the data position
is the step, resume is exact, and the order is the same for any number of workers, processes and micro-batches.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler


@dataclass(frozen=True)
class ItemId:
    """One visit of one item: its index in the data and the epoch of the visit."""

    epoch: int
    index: int


def item_random(seed: int, item: ItemId, purpose: str) -> random.Random:
    """The random numbers of one visit for one purpose (augmentation, caption choice, ...)."""
    text = f"{seed}/{item.epoch}/{item.index}/{purpose}"
    return random.Random(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, length: int) -> list[int]:
    """The permutation of one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(length, generator=generator).tolist()


def batch_items(seed: int, step: int, batch_size: int, length: int) -> list[ItemId]:
    """The items of global batch `step`, in order; a batch may span two epochs."""
    items = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, length)
        items.append(ItemId(epoch, epoch_order(seed, epoch, length)[offset]))
    return items


class MicroBatches(Sampler[list[ItemId]]):
    """This process's micro-batches from `first_step` to `last_step`: [accumulation x world x micro] of each global batch."""

    def __init__(self, length: int, batch_size: int, accumulation: int, seed: int, rank: int, world_size: int,
                 first_step: int, last_step: int) -> None:
        self.length, self.batch_size, self.accumulation, self.seed = length, batch_size, accumulation, seed
        self.rank, self.world_size, self.first_step, self.last_step = rank, world_size, first_step, last_step

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[ItemId]]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        for step in range(self.first_step, self.last_step):
            items = batch_items(self.seed, step, self.batch_size, self.length)
            for part in range(self.accumulation):
                start = (part * self.world_size + self.rank) * micro
                yield items[start: start + micro]


def batch_loader(dataset: Any, order: MicroBatches, workers: int, collate: Any) -> DataLoader:
    """A DataLoader over `dataset[ItemId]` in that order. Workers change the speed, never the content."""
    # its own generator: a loader draws a seed when it starts, which must not shift the run's random numbers
    return DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate, generator=torch.Generator(),
                      persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
                      prefetch_factor=4 if workers else None)
