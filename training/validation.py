"""What is measured on a held-out split while a run goes on, and which of two measurements is the better one."""

from __future__ import annotations

import math
from dataclasses import dataclass

HIGHER_IS_BETTER = {"validation_loss": False, "validation_psnr": True, "validation_top1": True}
"""Every number of a held-out split that metrics.jsonl may have: nats a token, dB, share of captions found."""


@dataclass(frozen=True)
class Measured:
    """A number of the held-out split; name: one of HIGHER_IS_BETTER."""

    name: str
    value: float

    def better_than(self, other: Measured | None) -> bool:
        """Whether this is the best so far, of a run that had `other`; what is not finite never is, an equal one is not."""
        if other is None or not math.isfinite(self.value):
            return math.isfinite(self.value)
        return self.value > other.value if HIGHER_IS_BETTER[self.name] else self.value < other.value
