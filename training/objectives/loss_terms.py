"""The result of an objective: what is minimized, and its parts for the log."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossTerms(NamedTuple):
    """The sum [] float32 with gradients, and its parts [] by name, unweighted and detached."""

    total: Tensor
    terms: dict[str, Tensor]
