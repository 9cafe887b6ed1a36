"""A float32 copy of the weights that follows them slowly (EMA), which is then what is sampled, measured and exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PREFIX = "average."  # of its tensors in a checkpoint


def weight_average(module: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """average = decay * average + (1 - decay) * weights after each `update_parameters`; the first one copies."""
    rest = 1 - decay

    def follow(average: Tensor, weights: Tensor, _: Tensor | int) -> Tensor:
        return average.lerp(weights.to(average.dtype), rest)  # leaves equal values as they are, so frozen parts to the bit

    return AveragedModel(module, device, follow)


def average_state(average: AveragedModel | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of an average, by names of its own; nothing for None."""
    return {} if average is None else {f"{PREFIX}{name}": tensor for name, tensor in average.state_dict().items()}


def restore_average(average: AveragedModel | None, state: dict[str, Tensor]) -> None:
    """Put back what average_state gave."""
    if average is not None:
        average.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state.items()})
