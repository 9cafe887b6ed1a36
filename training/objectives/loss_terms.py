"""The result of an objective: what is minimized, and its parts for the log."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """`total` [] float32 has gradients; `terms` are its parts [] by name, before weighting and
    detached."""

    total: Tensor
    terms: dict[str, Tensor]
