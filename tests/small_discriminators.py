"""Small discriminators of every kind and the images that tests feed them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenizer_image.discriminators import (
    DiscriminatorConfig,
    build_discriminator,
)

SMALL = [{"channels": 8, "layers": 2, "norm": "group"},
         {"channels": 8, "layers": 2, "norm": "batch"},
         {"channels": 8, "layers": 2, "norm": "none"}, {"kind": "stylegan", "channels": 8}]
each_small = pytest.mark.parametrize("options", SMALL, ids=lambda o: "-".join(map(str, o.values())))


def make(resolution: int = 16, in_channels: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_discriminator(DiscriminatorConfig(**options), resolution, in_channels)


def pictures(batch: int = 3, side: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
