"""The adversarial term: a discriminator learns to tell pictures from reconstructions, the tokenizer to deceive it.

Pure functions of logits and steps, in float32; the networks are in `discriminators.py`, the two optimizers in the
trainer. Under DeepSpeed the forwards go through `engine.module`: gradients inside a step break the engine's own forward.

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
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import choose

AverageOverProcesses = Callable[[Tensor], Tensor]


class AdversarialConfig(StrictConfig):
    """When and how strongly the adversarial term works. Steps are optimizer steps of the run, counted from 0.

    A switch that is off leaves its details unread (`start_step` where weight is 0, `r1_every` where r1_weight is 0), so
    that one override turns a recipe's part off.
    """

    weight: float = Field(default=0.0, ge=0)
    """Of the generator's term, times the adaptive weight. 0 = no discriminator. taming 0.8, LlamaGen 0.5, ViT-VQGAN 0.1."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """hinge: Lim and Ye 2017, arXiv 1705.02894. non_saturating: the logistic form of Goodfellow et al. 2014."""
    start_step: int = Field(default=0, ge=0)
    """The discriminator learns from this step on. taming: 10,000 to 250,001; LlamaGen: 20,000."""
    head_start_steps: int = Field(default=0, ge=0)
    """The discriminator learns alone for this many steps before the generator hears of it."""
    warmin_steps: int = Field(default=0, ge=0)
    """After the head start, the generator's term rises linearly to its full weight over this many steps."""
    adaptive: bool = True
    """Scale the generator's term so that its gradient at the last layer is as long as the reconstruction's."""
    max_adaptive_weight: float = Field(default=1e4, gt=0)
    """Upper bound of that scale; 1e4 is taming's, which only guards against a gradient of almost zero."""
    lecam_weight: float = Field(default=0.0, ge=0)
    """Of the LeCAM regularizer in the discriminator's loss. Open-MAGVIT2 0.05, TiTok 0.001."""
    lecam_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay a micro-batch of the averages that LeCAM compares with; 0 = the last micro-batch alone."""
    r1_weight: float = Field(default=0.0, ge=0)
    """gamma of R1: the term is gamma/2 times the penalty (Mescheder et al. 2018, arXiv 1801.04406, eq. 9)."""
    r1_every: int = Field(default=16, gt=0)
    """R1 is computed on every such step and counts that many times (StyleGAN2's lazy regularization)."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, value in (("lecam_weight", self.lecam_weight), ("r1_weight", self.r1_weight)):
            if value and not self.weight:
                raise ValueError(f"{name} {value:g} has no effect without a discriminator, which weight 0 means; "
                                 f"set weight above 0, or {name} to 0")
        return self


class _Shape(NamedTuple):
    """What a kind of loss makes of each logit, before the mean."""

    generator: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]


_SHAPES = {
    "hinge": _Shape(torch.neg, lambda logits: F.relu(1 - logits), lambda logits: F.relu(1 + logits)),
    # softplus(-l) = -log sigmoid(l): the logit's sign is all that tells the two targets apart
    "non_saturating": _Shape(lambda logits: F.softplus(-logits), lambda logits: F.softplus(-logits), F.softplus),
}


def generator_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """Logits [B, ...] of reconstructions -> [] float32, small where they pass for real. UserError on another kind."""
    return choose(_SHAPES, kind, "adversarial loss").generator(fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Logits [B, ...] of pictures and of reconstructions -> [] float32: half the sum of the two means, as in taming.

    UserError on another kind.
    """
    shape = choose(_SHAPES, kind, "adversarial loss")
    return 0.5 * (shape.real(real_logits.float()).mean() + shape.fake(fake_logits.float()).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, maximum: float) -> Tensor:
    """Lambda of Esser et al. 2021 (arXiv 2012.09841), eq. 7: |grad of rec| / (|grad of adv| + 1e-4), in [0, maximum].

    Both losses [] must depend on the weight `last_layer`; the graphs are kept. A commitment term in the first one does
    not matter: it does not reach the last layer. -> [] float32 without gradients, of this process's micro-batch.

    Never NaN: no adversarial gradient gives `maximum` at most, and where either gradient is not finite the ratio means
    nothing, so the answer is 0. A loss that is itself NaN stays so times 0; finding that is the trainer's part.
    """
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction_loss, adversarial_loss))
    ratio = (of_reconstruction / (of_adversarial + 1e-4)).clamp(0.0, maximum)
    finite = torch.isfinite(of_reconstruction) & torch.isfinite(of_adversarial)
    return torch.where(finite, ratio, torch.zeros_like(ratio)).detach()


def generator_weight(step: int, config: AdversarialConfig, reconstruction_loss: Tensor, adversarial_loss: Tensor,
                     last_layer: Tensor) -> Tensor:
    """What `adversarial_loss` is multiplied by at a step: weight x warm-in x adaptive weight -> [] float32, detached."""
    constant = config.weight * warmin(step, config)
    if not constant or not config.adaptive:
        return torch.tensor(constant, device=last_layer.device)
    return constant * adaptive_weight(reconstruction_loss, adversarial_loss, last_layer, config.max_adaptive_weight)


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real_image: Tensor) -> Tensor:
    """Squared length of the logit's gradient at pictures [B, C, H, W], mean over B -> [] float32 with gradients.

    Mescheder et al. 2018, arXiv 1801.04406, eq. 9, without its gamma/2. A picture's logit is the mean of its patches,
    as it is in the losses, so that gamma means the same for one logit [B, 1] and for a map [B, 1, h, w].
    """
    image = real_image.detach().float().requires_grad_()
    logits = discriminator(image).float().flatten(1).mean(dim=1)  # [B]
    (slope,) = torch.autograd.grad(logits.sum(), image, create_graph=True)  # samples do not mix: a row is its own gradient
    return slope.flatten(1).square().sum(dim=1).mean()


def r1_factor(step: int, config: AdversarialConfig) -> float:
    """What `r1_penalty` is multiplied by at a step: gamma/2 x r1_every on the steps that compute it, 0 on the others."""
    due = (step - config.start_step) % config.r1_every == 0
    return config.r1_weight / 2 * config.r1_every if due and discriminator_active(step, config) else 0.0


def discriminator_active(step: int, config: AdversarialConfig) -> bool:
    """Whether the discriminator learns at a 0-based step."""
    return config.weight > 0 and step >= config.start_step


def warmin(step: int, config: AdversarialConfig) -> float:
    """The share in [0, 1] of its weight that the generator's term has at a 0-based step.

    0 before start_step + head_start_steps, then 1/warmin_steps on the first step and 1 on the warmin_steps-th, like
    the learning rate's warm-up.
    """
    taken = step - config.start_step - config.head_start_steps + 1
    return 0.0 if taken < 1 else min(1.0, taken / max(1, config.warmin_steps))


class LeCAM(nn.Module):
    """Holds the logits near moving averages of the other side's (Tseng et al. 2021, arXiv 2104.03310).

    The paper squares the distance on both sides; the authors' code squares it only where the logit is on its own side
    of the average, relu(D(x) - fake)^2 + relu(real - D(fake))^2, and so does this: a logit
    that is wrong is not held back from becoming right.

    The averages are state: save them with the discriminator. `update` is called once a micro-batch, so under
    accumulation they move several times an optimizer step.
    """

    ema_real: Tensor
    ema_fake: Tensor
    initialized: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        """`decay` in [0, 1) a micro-batch."""
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def update(self, real_logits: Tensor, fake_logits: Tensor, reduce: AverageOverProcesses | None = None) -> None:
        """Move the averages towards the means of logits [B, ...]; the first call sets them.

        `reduce` takes [2] and returns its average over the processes; without it each keeps averages of its own.
        Means that are not finite are left out: averages would never recover from one.
        """
        means = torch.stack([real_logits.float().mean(), fake_logits.float().mean()])
        if reduce is not None:
            means = reduce(means)
        before = torch.stack([self.ema_real, self.ema_fake])
        # no branch on the device's values: reading them would wait for the device
        moved = torch.where(self.initialized, before.lerp(means, 1 - self.decay), means)
        usable = torch.isfinite(means).all()
        real, fake = torch.where(usable, moved, before)
        self.ema_real.copy_(real)
        self.ema_fake.copy_(fake)
        self.initialized.logical_or_(usable)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Logits [B, ...] -> [] float32 with gradients; 0 before the first `update`."""
        above = F.relu(real_logits.float() - self.ema_fake).square().mean()
        below = F.relu(self.ema_real - fake_logits.float()).square().mean()
        return (above + below) * self.initialized


class DiscriminatorLoss(NamedTuple):
    """`total` [] has gradients; `terms` are its parts before weighting, `weighted` after, `logits` the two means; detached."""

    total: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor]
    logits: dict[str, Tensor]


def discriminator_objective(discriminator: Callable[[Tensor], Tensor], real_image: Tensor, fake_image: Tensor, step: int,
                            config: AdversarialConfig, lecam: LeCAM | None = None,
                            reduce: AverageOverProcesses | None = None) -> DiscriminatorLoss:
    """All that the discriminator makes small on a micro-batch of images [B, C, H, W] at a 0-based step.

    `fake_image` is detached here. `lecam` is needed where lecam_weight is above 0, and is updated before it is used;
    `reduce` is passed on to it. `terms` has "discriminator", "lecam" with its weight, "r1" on the steps that compute it.
    """
    # Two forwards, not one of both halves: batch statistics would give the fake ones away, and taming has two.
    real_logits, fake_logits = discriminator(real_image), discriminator(fake_image.detach())
    parts = {"discriminator": (discriminator_loss(real_logits, fake_logits, config.loss), 1.0)}
    if config.lecam_weight:
        assert lecam is not None, "lecam_weight is set, so the trainer makes a LeCAM"
        lecam.update(real_logits, fake_logits, reduce)
        parts["lecam"] = (lecam(real_logits, fake_logits), config.lecam_weight)
    factor = r1_factor(step, config)
    if factor:
        parts["r1"] = (r1_penalty(discriminator, real_image), factor)
    weighted = {name: value * weight for name, (value, weight) in parts.items()}
    return DiscriminatorLoss(
        torch.stack(list(weighted.values())).sum(), {name: value.detach() for name, (value, _) in parts.items()},
        {name: value.detach() for name, value in weighted.items()},
        {name: logits.detach().float().mean() for name, logits in (("logits_real", real_logits), ("logits_fake", fake_logits))})
