"""The discriminator of a tokenizer's training: its own DeepSpeed engine, and the two halves of a step.

It is trained in float32 whatever the tokenizer runs in: R1 and LeCAM compare small differences of its logits.
"""

# Axes: B batch, S pixels of a side

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer_image.adversarial import (
    LeCAM,
    discriminator_active,
    discriminator_objective,
    generator_loss,
    generator_weight,
    warmin,
)
from tokenizer_image.discriminators import build_discriminator
from training.config.tokenizer import TokenizerRunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.optim import build_optimizer
from training.engine.processes import Processes

NAME = "discriminator"


class Adversary:
    """Learns to tell pictures from reconstructions, and tells the tokenizer how far it is deceived."""

    def __init__(self, config: TokenizerRunConfig, group: Processes) -> None:
        self.config, self.group = config.adversarial, group
        discriminator = build_discriminator(self.config.discriminator, config.model.resolution, config.model.in_channels)
        optimizer = build_optimizer(discriminator, config.discriminator_optim)
        self.engine = Engine(discriminator, optimizer, config, group, "float32", config.discriminator_optim, NAME,
                             self.config.start_step)
        self.lecam = LeCAM(self.config.lecam_decay).to(group.device)

    def generator_term(self, reconstruction: Tensor, reconstruction_loss: Tensor, last_layer: Tensor, step: int
                       ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction [B, 3, S, S] with gradients -> the weighted term [], and what to log; 0 before its time."""
        if not warmin(step, self.config):
            return torch.zeros((), device=reconstruction.device), {}
        discriminator = self._network(learns=False)
        term = generator_loss(discriminator(reconstruction.float()), self.config.loss)
        weight = self._average(generator_weight(step, self.config, reconstruction_loss, term, last_layer))
        return term * weight, {"generator": term.detach(), "generator_weight": weight,
                               "weighted.generator": (term * weight).detach()}

    def train(self, image: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """One micro-batch of pictures and reconstructions [B, 3, S, S]: gradients and a step -> terms to log."""
        if not discriminator_active(step, self.config):
            return {}
        loss = discriminator_objective(self._network(learns=True), image.float(), reconstruction.float(), step, self.config,
                                       self.lecam, reduce=self._average)
        self.engine.backward(loss.total, step + 1, loss.terms)
        self.engine.step(step + 1)
        return {**loss.terms, **{f"weighted.{name}": value for name, value in loss.weighted.items()}, **loss.logits}

    def _network(self, learns: bool) -> nn.Module:
        """The network itself: the engine's own forward allows no gradient inside a step. In the tokenizer's half it must not
        collect gradients, or its next step would be taken along them as well.
        """
        return self.engine.module.requires_grad_(learns)

    def _average(self, value: Tensor) -> Tensor:
        return self.group.total(value) / self.group.world_size
