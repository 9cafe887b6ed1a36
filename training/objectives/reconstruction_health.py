"""Watch whether the images come through a tokenizer: a number, and a warning with remedies."""

# Axes: B batch, S pixels of a side

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tokenizer_image import ImageTokenizer
from tokenizer_image.quantizer_config import READ_BY_KIND
from training.config.tokenizer import TokenizerRunConfig
from training.data.visits.images import ImageVisits, collate_pixels
from training.data.visits.order import ItemId
from training.engine.processes import Processes
from training.evaluation.image_metrics.image_spread import ImageSpread

log = logging.getLogger(__name__)

BLANK_BELOW = 0.1
"""Share of the differences between images below which they do not come through. Tokenizers that
make one image of all keep 0 to 0.03; those that learn had passed 0.3 by step 150."""
RECOVERED_FROM = 0.15  # not at the threshold itself, around which the share varies
ENOUGH_IMAGES = 64  # that a verdict needs
EARLY_STEPS = (200, 2000)
"""Least and most steps after the warm-up in which low numbers are no sign of anything; between them
a twentieth of the run. A discrete VAE passed the threshold at step 155."""
FEW_STEPS = 240  # fewer teach even a small network little
STRONG_L2 = 80
"""Times the commitment weight: l2_weight is above that term also where images hardly differ, as
thin lines do."""
LOW_LR = 1e-4  # slow, but no reason for images that do not come through
BATCH = 8  # images that the export is checked with at a time


class ReconstructionHealth:
    """The share of the differences between images that a run's reconstructions keep."""

    def __init__(self, config: TokenizerRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.spread = self._empty_spread()
        self.is_blank = False  # at the last report, whether it was warned of or not
        self._warned = False
        self._done = 0  # steps

    def _empty_spread(self) -> ImageSpread:
        side = self.config.model.resolution
        return ImageSpread(side, side, self.group.device)

    def update(self, image: Tensor, reconstruction: Tensor, step: int) -> None:
        """Add one micro-batch [B, 3, S, S] of this process, in [-1, 1], of step 0 .."""
        self.spread.update(image, reconstruction)
        self._done = step + 1

    def report(self) -> dict[str, float]:
        """Return the number of a log line, none where images do not differ.

        Over the images since the last line, or since an earlier one if those are few. All processes
        must call it.
        """
        kept = self.spread.kept(self.group.total)
        if kept is not None:
            self.is_blank = kept < BLANK_BELOW

        seen = int(self.group.total(self.spread.count))
        if seen >= ENOUGH_IMAGES:
            if kept is not None:
                self._say(kept, seen)
            self.spread.clear()
        return {} if kept is None else {"reconstruction_spread": kept}

    def _say(self, kept: float, seen: int) -> None:
        """Warn once of images that do not come through, and say when they do."""
        if not self.is_blank:
            if self._warned and kept >= RECOVERED_FROM:
                log.info("the pictures come through now: their reconstructions keep %.0f %% of "
                         "what tells them apart", 100 * kept)
                self._warned = False
            return

        # a network that has just begun draws one image too
        least, most = EARLY_STEPS
        early_steps = min(max(least, self.config.train.steps // 20), most)
        is_early = self._done < self.config.optim.warmup_steps + early_steps
        if not (self._warned or is_early):
            self._warned = True
            log.warning("the pictures do not come through: after %s steps the reconstructions of "
                        "the last %s keep %.0f %% of what tells them apart. Try %s",
                        f"{self._done:,}", f"{seen:,}", 100 * max(0, kept),
                        "; or ".join(self._remedies()))

    @torch.no_grad()
    def check_export(self, model: ImageTokenizer, visits: ImageVisits) -> None:
        """Warn if training images do not come through the exported model. First process only."""
        # its codes are not those of training with a Gumbel quantizer, nor its weights with an
        # average, so the last log line does not speak for it
        count = min(ENOUGH_IMAGES, len(visits))
        places = [number * len(visits) // count for number in range(count)]
        spread = self._empty_spread()
        model.to(self.group.device)
        for start in range(0, count, BATCH):
            items = [visits[ItemId(0, place)] for place in places[start:start + BATCH]]
            image = collate_pixels(items).image.to(self.group.device)
            spread.update(image, model.decode(model.encode(image)))

        kept = spread.kept()
        if kept is not None and kept < BLANK_BELOW:
            log.warning("the pictures do not come through this tokenizer: of %d training pictures, "
                        "its reconstructions keep %.0f %% of what tells them apart. Try %s", count,
                        100 * max(0, kept), "; or ".join(self._remedies()))

    def _remedies(self) -> list[str]:
        """Return what has helped (docs/tokenizers.md), without what this run does already."""
        loss, lr, steps = self.config.loss, self.config.optim.lr, self.config.train.steps
        advice = []
        if steps < FEW_STEPS:
            advice.append(f"--train.steps {FEW_STEPS}")
        # the least L1 error of a pixel that is background in most images is background in all
        if loss.l1_weight:
            advice.append(f"--loss.l1_weight 0 --loss.l2_weight {max(4, loss.l2_weight):g}")
        elif loss.l2_weight < self._strong_l2():
            advice.append(f"--loss.l2_weight {self._strong_l2():g}")
        if lr > LOW_LR:
            advice.append(f"--optim.lr {max(LOW_LR, lr / 4):g}")
        if steps >= FEW_STEPS:
            advice.append("longer training")
        return advice

    def _strong_l2(self) -> float:
        """The l2_weight that outweighs the commitment term; 0 without one."""
        quantizer = getattr(self.config.model, "quantizer", None)  # none in a discrete VAE
        if quantizer is None or "commitment_weight" not in READ_BY_KIND[quantizer.kind]:
            return 0.0
        return STRONG_L2 * quantizer.commitment_weight

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {**self.spread.state(), "warned": torch.tensor(self._warned)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`."""
        self.spread.restore(state)
        self._warned = bool(state["warned"])
