"""Data loader over micro-batches that raises the workers' errors with their own messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tokenloom_common.errors import RunFailedError, UserError
from training.data.visits.order import MicroBatches


def batch_loader(dataset: Any, order: MicroBatches, workers: int,
                 collate: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield batches of `dataset[ItemId]` in that order, whatever the number of workers.

    Errors of a worker are raised as in `reraising_loader`.
    """
    # torch refuses persistent_workers and prefetch_factor where there are no workers
    yield from reraising_loader(dataset, collate, batch_sampler=order, num_workers=workers,
                                persistent_workers=workers > 0,
                                pin_memory=torch.cuda.is_available(),
                                prefetch_factor=4 if workers else None)


def reraising_loader(dataset: Any, collate: Callable[[Any], Any], **options: Any) -> Iterator[Any]:
    """Yield the batches of a DataLoader; raise UserError and RunFailedError of a worker unchanged.

    torch would replace the message by the worker's traceback, so errors travel in place of a batch.
    """
    # its own generator: a loader draws a seed when it starts, which must not advance the run's RNG
    loader = DataLoader(_ErrorsAsRows(dataset), collate_fn=_CollateUnlessError(collate),
                        generator=torch.Generator(), **options)
    for batch in loader:
        if isinstance(batch, _WorkerError):
            raise batch.error
        yield batch


class _WorkerError:
    """An error in place of a batch."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _ErrorsAsRows(Dataset):
    """The dataset, returning an error with a message of its own as a _WorkerError."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, items: Sequence[Any]) -> Any:
        # torch calls this instead of __getitem__: one error then stands for the whole batch
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(items)
            return [self.dataset[item] for item in items]
        except (UserError, RunFailedError) as error:  # of others, a bug's, the traceback helps
            return _WorkerError(error)


class _CollateUnlessError:
    """The collate function, behind a check for errors (a class, so that workers can receive it)."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Any) -> Any:
        return rows if isinstance(rows, _WorkerError) else self.collate(rows)
