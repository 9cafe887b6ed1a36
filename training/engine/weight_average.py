"""An exponential moving average (EMA) of the weights in float32.

Where a run has one, the average is what is sampled, measured and exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def weight_average(module: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """Make an average that follows the weights of `module`.

    Each `update_parameters` sets average = decay * average + (1 - decay) * weights; the first one
    copies the weights.
    """
    new_weight = 1 - decay

    def average_fn(average: Tensor, weights: Tensor, _: Tensor | int) -> Tensor:
        # lerp leaves equal values as they are, so frozen parts stay equal to the bit
        return average.lerp(weights.to(average.dtype), new_weight)

    return AveragedModel(module, device, average_fn)
