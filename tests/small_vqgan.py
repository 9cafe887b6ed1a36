"""A VQGAN small enough for tests, its images and a few steps of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokenizer_image import Reconstruction, VQGANConfig, preset
from tokenizer_image.vqgan import VQGAN

DEBUG = preset("debug")
ATTENTIVE = VQGANConfig(**{**DEBUG.plain(), "attention_resolutions": [8]})


def make_vqgan(config: VQGANConfig = DEBUG) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(config)


def make_image(batch: int = 4, side: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def loss_of(result: Reconstruction, image: torch.Tensor) -> torch.Tensor:
    own_terms = sum(part.value * part.weight for part in result.losses.values())
    return F.l1_loss(result.reconstruction, image) + own_terms


def trained_vqgan(config: VQGANConfig = DEBUG, steps: int = 3) -> VQGAN:
    model = make_vqgan(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        image = make_image(seed=10 + step)
        result = model(image)
        optimizer.zero_grad()
        loss_of(result, image).backward()
        optimizer.step()
    return model
