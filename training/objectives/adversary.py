"""The discriminator of a tokenizer's run: its own DeepSpeed engine, and its half of a step.

It is trained in float32 whatever the tokenizer runs in: R1 and LeCAM compare small differences of
its logits.
"""

# Axes: B batch, S pixels of a side

from __future__ import annotations

from torch import Tensor

from tokenizer_image.adversarial import LeCAM, discriminator_active
from tokenizer_image.discriminators import build_discriminator
from training.config.tokenizer import TokenizerRunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.optim import build_optimizer
from training.engine.processes import Processes
from training.objectives.tokenizer import AdversarialTerms

NAME = "discriminator"  # in metrics.jsonl (discriminator.lr) and in a checkpoint's files


class Adversary:
    """A discriminator that learns to tell images from reconstructions."""

    def __init__(self, config: TokenizerRunConfig, group: Processes) -> None:
        self.config = config.adversarial
        discriminator = build_discriminator(self.config.discriminator, config.model.resolution,
                                            config.model.in_channels)
        optimizer = build_optimizer(discriminator, config.discriminator_optim)
        self.engine = Engine(discriminator, optimizer, config, group, "float32",
                             config.discriminator_optim, NAME, self.config.start_step)
        self.terms = AdversarialTerms(
            self.config, self.engine.module, average=lambda x: group.total(x) / group.world_size)
        self.lecam.to(group.device)  # its averages are compared with logits there

    @property
    def lecam(self) -> LeCAM:
        """The moving averages of LeCAM, which are part of a checkpoint."""
        return self.terms.lecam

    def train(self, image: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """Learn from one micro-batch of images and reconstructions [B, 3, S, S] -> terms to log."""
        if not discriminator_active(step, self.config):
            return {}
        loss = self.terms.discriminator_loss(image, reconstruction, step)
        self.engine.backward(loss.total, step + 1, loss.terms)
        self.engine.step(step + 1)
        weighted = {f"weighted.{name}": value for name, value in loss.weighted.items()}
        return {**loss.terms, **weighted, **loss.logits}
