"""A float32 copy of the weights that follows them slowly (EMA), which is then what is sampled, measured and exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def weight_average(module: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """average = decay * average + (1 - decay) * weights after each `update_parameters`; the first one copies."""
    rest = 1 - decay

    def follow(average: Tensor, weights: Tensor, _: Tensor | int) -> Tensor:
        return average.lerp(weights.to(average.dtype), rest)  # leaves equal values as they are, so frozen parts to the bit

    return AveragedModel(module, device, follow)
