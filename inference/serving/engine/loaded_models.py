"""The models in memory: loaded when a job needs one, within the budget; the least recently used
idle one leaves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection

import torch

from inference.serving.engine.batches import ModelBatch
from inference.serving.engine.models import Models

log = logging.getLogger(__name__)


class LoadedModels:
    """Batches by the names of their models. Used by one thread.

    turn: seconds that a model may draw its own jobs before it makes room for one that does not fit
    beside it.
    """

    def __init__(self, models: Models, make: Callable[[str], ModelBatch], turn: float,
                 clock: Callable[[], float]) -> None:
        """make: loads a model."""
        self.models = models
        self._make = make
        self._turn = turn
        self._clock = clock
        self._batches: dict[str, ModelBatch] = {}  # in the order of their turns

    @property
    def batches(self) -> list[ModelBatch]:
        """Return the batches; from any thread."""
        return list(self._batches.values())

    @property
    def bytes(self) -> int:
        """Predicted bytes of all loaded models."""
        return sum(self.models[batch.name].bytes for batch in self.batches)

    def next_turn(self) -> ModelBatch | None:
        """Return the batch whose turn it is to draw: each that has jobs, one after another."""
        for name, batch in self._batches.items():
            if not batch.idle:
                self._batches[name] = self._batches.pop(name)  # to the end
                return batch
        return None

    def get(self, name: str, wanted: Collection[str] = ()) -> ModelBatch | None:
        """Return a model's batch if it is loaded, or if idle ones can make room for it.

        wanted: models that jobs wait for; they stay while it is their turn. UserError for a model
        that cannot be loaded.
        """
        if name in self._batches:
            return self._batches[name]
        missing = self._missing(name)
        leaving = []
        for batch in sorted(self.batches, key=lambda batch: batch.used_at):
            if missing <= 0:
                break
            if batch.idle and self._may_leave(batch, wanted):
                leaving.append(batch.name)
                missing -= self.models[batch.name].bytes
        if missing > 0:
            return None

        for other in leaving:
            self.remove(other)
        batch = self._make(name)
        self._batches[name] = batch
        log.info("model %s is loaded; models may take %s bytes and take %s", name,
                 self.models.budget, self.bytes)
        return batch

    def in_the_way(self, name: str, wanted: Collection[str]) -> set[str]:
        """Return the models that should take no more jobs, so that there is room for this one.

        Empty while the others have their turn.
        """
        missing = self._missing(name)
        leaving: set[str] = set()
        for batch in sorted(self.batches, key=lambda batch: batch.loaded_at):
            if missing > 0 and self._may_leave(batch, wanted):
                leaving.add(batch.name)
                missing -= self.models[batch.name].bytes
        return leaving if missing <= 0 else set()

    def _may_leave(self, batch: ModelBatch, wanted: Collection[str]) -> bool:
        return batch.name not in wanted or self._clock() - batch.loaded_at >= self._turn

    def remove(self, name: str) -> None:
        """Let a model leave."""
        del self._batches[name]
        gc.collect()  # its decoder and its hooks refer to one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.info("model %s left", name)

    def _missing(self, name: str) -> int:
        """Return the bytes that a model lacks; 0 or less where it fits."""
        if self.models.budget is None:
            return 0
        return self.bytes + self.models[name].bytes - self.models.budget


def names_of(batches: Collection[ModelBatch]) -> tuple[str, ...]:
    """Return the names of the batches' models."""
    return tuple(batch.name for batch in batches)
