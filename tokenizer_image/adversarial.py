"""Adversarial loss: a discriminator tells images from reconstructions, the tokenizer deceives it.

Pure functions of logits and steps, in float32. The networks are in `discriminators.py`, the two
optimizers in the trainer. Under DeepSpeed the forwards go through `engine.module`: gradients taken
inside a step break the engine's own forward.

Axes: B batch, C channels, H W pixels, h w patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokenizer_image.discriminators import DiscriminatorConfig
from tokenizer_image.losses import weighted_loss
from tokenizer_image.quantizers import LossPart
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import choose

AverageOverProcesses = Callable[[Tensor], Tensor]


class AdversarialConfig(StrictConfig):
    """When and how strongly the adversarial loss works; steps are optimizer steps from 0.

    The details of a term that is off are not read (`start_step` where weight is 0, `r1_every` where
    r1_weight is 0), so that one override turns a part of a recipe off.
    """

    weight: float = Field(default=0.0, ge=0)
    """Weight of the generator's term, times the adaptive weight. 0 = no discriminator. taming 0.8,
    LlamaGen 0.5, ViT-VQGAN 0.1."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """hinge: Lim and Ye 2017, arXiv 1705.02894. non_saturating: Goodfellow et al. 2014."""
    start_step: int = Field(default=0, ge=0)
    """The discriminator learns from this step on. taming: 10,000 to 250,001; LlamaGen: 20,000."""
    head_start_steps: int = Field(default=0, ge=0)
    """The discriminator learns alone for this many steps before the generator hears of it."""
    warmin_steps: int = Field(default=0, ge=0)
    """Steps over which the generator's term rises linearly to its weight, after the head start."""
    adaptive: bool = True
    """Scale the generator's term so that its gradient at the last layer equals the
    reconstruction's in length."""
    max_adaptive_weight: float = Field(default=1e4, gt=0)
    """Upper bound of that scale; taming's 1e4 only guards against a gradient of almost zero."""
    lecam_weight: float = Field(default=0.0, ge=0)
    """Weight of LeCAM in the discriminator's loss. Open-MAGVIT2 0.05, TiTok 0.001."""
    lecam_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per micro-batch of the averages that LeCAM compares with; 0 = the last one alone."""
    r1_weight: float = Field(default=0.0, ge=0)
    """gamma of R1; its term is gamma/2 x the penalty (arXiv 1801.04406, eq. 9)."""
    r1_every: int = Field(default=16, gt=0)
    """Steps between two R1 terms; each counts that many times (StyleGAN2's lazy regularization)."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @model_validator(mode="after")
    def _validate(self) -> Self:
        for name in ("lecam_weight", "r1_weight"):
            value = getattr(self, name)
            if value and not self.weight:
                raise ValueError(
                    f"{name} {value:g} has no effect without a discriminator, which weight 0 "
                    f"means; set weight above 0, or {name} to 0")
        return self


# ---- losses

class _LogitLosses(NamedTuple):
    """Loss of each logit, before the mean."""

    generator: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]


_LOSSES = {
    "hinge": _LogitLosses(
        generator=torch.neg,
        real=lambda logits: F.relu(1 - logits),
        fake=lambda logits: F.relu(1 + logits)),
    # softplus(-l) = -log sigmoid(l): only the sign of the logit tells the two targets apart
    "non_saturating": _LogitLosses(
        generator=lambda logits: F.softplus(-logits),
        real=lambda logits: F.softplus(-logits),
        fake=F.softplus),
}


def generator_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """Logits [B, ...] of reconstructions -> [] float32, small where they pass for real.

    UserError on an unknown kind.
    """
    losses = choose(_LOSSES, kind, "adversarial loss")
    return losses.generator(fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Logits [B, ...] of images and reconstructions -> [] float32: half the sum of their means.

    The half is taming's. UserError on an unknown kind.
    """
    losses = choose(_LOSSES, kind, "adversarial loss")
    real = losses.real(real_logits.float()).mean()
    fake = losses.fake(fake_logits.float()).mean()
    return 0.5 * (real + fake)


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real_image: Tensor) -> Tensor:
    """Squared norm of the logit's gradient at images [B, C, H, W] -> [] float32, mean over B.

    Mescheder et al. 2018, arXiv 1801.04406, eq. 9, without its gamma/2. The logit of an image is
    the mean of its patches, as it is in the losses, so that gamma means the same for one logit
    [B, 1] and for a map [B, 1, h, w].
    """
    image = real_image.detach().float().requires_grad_()
    logits = discriminator(image).float().flatten(1).mean(dim=1)  # [B]

    # Samples do not mix (but in a batch norm), so each row of the sum's gradient is that of its
    # own logit.
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gradient.flatten(1).square().sum(dim=1).mean()


# ---- weights

def generator_weight(step: int, config: AdversarialConfig, reconstruction_loss: Tensor,
                     adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Weight of `adversarial_loss`: weight x warm-in x adaptive weight -> [], detached."""
    constant = config.weight * warmin(step, config)
    # no gradients are taken where the answer does not depend on them
    if not constant or not config.adaptive:
        return torch.tensor(constant, device=last_layer.device)
    return constant * adaptive_weight(
        reconstruction_loss, adversarial_loss, last_layer, config.max_adaptive_weight)


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor,
                    maximum: float) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4), in [0, maximum] -> [] detached.

    Lambda of Esser et al. 2021 (arXiv 2012.09841), eq. 7, of this process's micro-batch. Both
    losses [] must depend on the weight `last_layer`; their graphs are kept. A commitment term in
    the first one does not matter: it does not reach the last layer.

    Never NaN. Without an adversarial gradient it is `maximum` at most, and 0 where either gradient
    is not finite, as the ratio means nothing there. A loss that is itself NaN stays NaN times 0;
    finding that is up to the trainer.
    """
    reconstruction = _gradient_norm(reconstruction_loss, last_layer)
    adversarial = _gradient_norm(adversarial_loss, last_layer)

    ratio = (reconstruction / (adversarial + 1e-4)).clamp(0.0, maximum)
    finite = torch.isfinite(reconstruction) & torch.isfinite(adversarial)
    return torch.where(finite, ratio, torch.zeros_like(ratio)).detach()


def _gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return gradient.float().norm()


def warmin(step: int, config: AdversarialConfig) -> float:
    """Return the share in [0, 1] of its weight that the generator's term has at a 0-based step.

    0 before start_step + head_start_steps, then 1/warmin_steps on the first step and 1 on the
    warmin_steps-th, like the learning rate's warm-up.
    """
    first = config.start_step + config.head_start_steps
    taken = step - first + 1  # steps with the term, this one included
    if taken < 1:
        return 0.0
    return min(1.0, taken / max(1, config.warmin_steps))


def discriminator_active(step: int, config: AdversarialConfig) -> bool:
    """Whether the discriminator learns at a 0-based step."""
    return config.weight > 0 and step >= config.start_step


def r1_factor(step: int, config: AdversarialConfig) -> float:
    """Weight of `r1_penalty` at a step: gamma/2 x r1_every on steps that compute it, else 0."""
    due = (step - config.start_step) % config.r1_every == 0
    if due and discriminator_active(step, config):
        return config.r1_weight / 2 * config.r1_every
    return 0.0


# ---- LeCAM

class LeCAM(nn.Module):
    """Holds the logits near moving averages of the other side's (Tseng et al. 2021, arXiv
    2104.03310).

    The paper squares the distance on both sides. The authors' code, and this, squares it only where
    the logit is on its own side of the average: relu(D(x) - fake)^2 + relu(real - D(fake))^2. So a
    wrong logit is not held back from becoming right.

    The averages are state: save them with the discriminator. `update` is called once per
    micro-batch, so under accumulation they move several times per optimizer step.
    """

    ema_real: Tensor
    ema_fake: Tensor
    initialized: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        """`decay` in [0, 1) per micro-batch."""
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def update(self, real_logits: Tensor, fake_logits: Tensor,
               reduce: AverageOverProcesses | None = None) -> None:
        """Move the averages towards the means of logits [B, ...]; the first call sets them.

        `reduce` takes [2] and returns its average over the processes; without it each process keeps
        averages of its own. Means that are not finite are left out: averages never recover from
        one.
        """
        means = torch.stack([real_logits.float().mean(), fake_logits.float().mean()])
        if reduce is not None:
            means = reduce(means)

        # no branch on the device's values: reading them would wait for the device
        before = torch.stack([self.ema_real, self.ema_fake])
        moved = torch.where(self.initialized, before.lerp(means, 1 - self.decay), means)
        finite = torch.isfinite(means).all()
        real, fake = torch.where(finite, moved, before)
        self.ema_real.copy_(real)
        self.ema_fake.copy_(fake)
        self.initialized.logical_or_(finite)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Logits [B, ...] -> [] float32 with gradients; 0 before the first `update`."""
        above = F.relu(real_logits.float() - self.ema_fake).square().mean()
        below = F.relu(self.ema_real - fake_logits.float()).square().mean()
        return (above + below) * self.initialized


# ---- the discriminator's objective

class DiscriminatorLoss(NamedTuple):
    """Loss on one micro-batch, as a TokenizerLoss, and the mean logits_real and logits_fake."""

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    logits: dict[str, Tensor]


def discriminator_objective(
        discriminator: Callable[[Tensor], Tensor], real_image: Tensor, fake_image: Tensor,
        step: int, config: AdversarialConfig, lecam: LeCAM | None = None,
        reduce: AverageOverProcesses | None = None) -> DiscriminatorLoss:
    """Return the discriminator's loss on a micro-batch of images [B, C, H, W] at a 0-based step.

    `fake_image` is detached here. `lecam` is required with lecam_weight above 0 and updated before
    use; `reduce` is passed on to it. Terms: "discriminator", "lecam" with its weight, "r1" on the
    steps that compute it.
    """
    # two forwards, as in taming: batch statistics over both halves would give the fakes away
    real_logits = discriminator(real_image)
    fake_logits = discriminator(fake_image.detach())

    adversarial = discriminator_loss(real_logits, fake_logits, config.loss)
    parts = {"discriminator": LossPart(adversarial, 1.0)}
    if config.lecam_weight:
        assert lecam is not None, "lecam_weight is set, so the trainer makes a LeCAM"
        lecam.update(real_logits, fake_logits, reduce)
        parts["lecam"] = LossPart(lecam(real_logits, fake_logits), config.lecam_weight)
    factor = r1_factor(step, config)
    if factor:
        parts["r1"] = LossPart(r1_penalty(discriminator, real_image), factor)

    loss = weighted_loss(parts)
    logits = {"logits_real": real_logits.detach().float().mean(),
              "logits_fake": fake_logits.detach().float().mean()}
    return DiscriminatorLoss(loss.total, loss.terms, loss.weighted, logits)
