"""The objective of an image tokenizer, and of the discriminator that it may have."""

# Axes: B batch, S pixels of a side

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenizer_image import LPIPS, Reconstruction, TokenizerLossConfig, tokenizer_loss
from tokenizer_image.adversarial import (
    AdversarialConfig,
    DiscriminatorLoss,
    LeCAM,
    discriminator_objective,
    generator_loss,
    generator_weight,
    warmin,
)
from training.objectives.loss_terms import LossTerms


class AdversarialTerms:
    """The two sides of the adversarial loss around one discriminator."""

    def __init__(self, config: AdversarialConfig, discriminator: nn.Module,
                 average: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """discriminator: the module itself, since an engine's own forward allows no gradient inside
        a step; average: takes a tensor to its mean over the processes."""
        self.config, self.discriminator, self.average = config, discriminator, average
        self.lecam = LeCAM(config.lecam_decay)

    def generator_term(self, reconstruction: Tensor, reconstruction_loss: Tensor,
                       last_layer: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tokenizer's weighted term [] and its parts to log.

        reconstruction [B, 3, S, S]: with gradients; last_layer: weight of the decoder's last layer,
        where the adaptive weight compares gradients. 0 and nothing to log before the warm-in.
        """
        if not warmin(step, self.config):
            return torch.zeros((), device=reconstruction.device), {}

        # or the discriminator's next step would go along these gradients as well, without an error
        # at stage 0; ZeRO 2 would fail (DeepSpeed#4923)
        self.discriminator.requires_grad_(False)
        # float32: the discriminator runs in nothing else
        term = generator_loss(self.discriminator(reconstruction.float()), self.config.loss)
        weight = generator_weight(step, self.config, reconstruction_loss, term, last_layer)
        weight = self.average(weight)  # the same one on every process
        weighted = term * weight
        return weighted, {"generator": term.detach(), "generator_weight": weight,
                          "weighted.generator": weighted.detach()}

    def discriminator_loss(self, image: Tensor, reconstruction: Tensor,
                           step: int) -> DiscriminatorLoss:
        """Return the discriminator's own loss on images and reconstructions [B, 3, S, S].

        Both are detached in it.
        """
        self.discriminator.requires_grad_(True)
        return discriminator_objective(self.discriminator, image.float(), reconstruction.float(),
                                       step, self.config, self.lecam, reduce=self.average)


class TokenizerObjective:
    """The loss of a tokenizer: reconstruction, perceptual and code terms, the adversarial one."""

    def __init__(self, loss: TokenizerLossConfig, perceptual: LPIPS | None = None,
                 adversarial: AdversarialTerms | None = None) -> None:
        self.loss, self.perceptual, self.adversarial = loss, perceptual, adversarial

    def __call__(self, result: Reconstruction, image: Tensor, last_layer: Tensor,
                 step: int) -> LossTerms:
        """Return the loss of a reconstruction of `image` [B, 3, S, S] at the run's 0-based `step`.

        Among the terms, `weighted.NAME` is a term as it enters the total.
        """
        loss = tokenizer_loss(result, image, self.loss, self.perceptual)
        total = loss.total
        terms = loss.terms | {f"weighted.{name}": term for name, term in loss.weighted.items()}
        if self.adversarial is not None:
            reconstruction = result.reconstruction
            # `total` so far is the reconstruction loss of the adaptive weight
            term, logged = self.adversarial.generator_term(reconstruction, total, last_layer, step)
            total = total + term
            terms |= logged
        return LossTerms(total, terms)
