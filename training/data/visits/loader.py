"""Data loader over micro-batches that survives unusable items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tokenloom_common.errors import RunFailedError, UserError
from training.data.visits.order import MicroBatches


def batch_loader(dataset: Any, order: MicroBatches, workers: int, collate: Callable[[Any], Any]) -> Iterator[Any]:
    """Batches of `dataset[ItemId]` in that order. Workers change the speed, never the content.

    An error with a message of its own that a worker met is raised here as it was.
    """
    yield from careful_loader(dataset, collate, batch_sampler=order, num_workers=workers, persistent_workers=workers > 0,
                              pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None)


def careful_loader(dataset: Any, collate: Callable[[Any], Any], **options: Any) -> Iterator[Any]:
    """What a DataLoader yields; errors of ours keep their message, to which torch would add a worker's traceback."""
    # its own generator: a loader draws a seed when it starts, which must not shift the run's random numbers
    for batch in DataLoader(_Careful(dataset), collate_fn=_Collate(collate), generator=torch.Generator(), **options):
        if isinstance(batch, _Met):
            raise batch.error
        yield batch


class _Met:
    """An error in place of a batch."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Careful(Dataset):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, items: Sequence[Any]) -> Any:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(items)
            return [self.dataset[item] for item in items]
        except (UserError, RunFailedError) as error:
            return _Met(error)


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> Any:
        return rows if isinstance(rows, _Met) else self.collate(rows)
