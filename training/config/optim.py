"""Config of an optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokenloom_common.config import StrictConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "constant", "exponential", "halving", "inverse_sqrt", "linear"]


class OptimConfig(StrictConfig):
    """The optimizer, and its learning rate after a linear warm-up."""

    READ_BY: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "final_lr_ratio": ("schedule", ("cosine", "exponential", "linear")),
        "decay_start_step": ("schedule", ("exponential",)),
        "halve_at_steps": ("schedule", ("halving",)),
        "update_clipping": ("name", ("adafactor",)),
        "parameter_scaling": ("name", ("adafactor",)),
    }
    """Option that is not always read -> the field that decides, and its values that read it."""

    name: Literal["adamw", "adafactor"] = Field(
        "adamw", description="adafactor: Parti's; needs deepspeed.zero_stage 0")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="decay of the first and of the second moment; Parti and DALL-E: "
                                 "0.9, 0.96; adafactor keeps no first moment with 0")
    weight_decay: float = Field(
        0.05, ge=0, description="on matrices; never on gains, biases and embeddings")
    update_clipping: float = Field(
        1.0, gt=0, description="adafactor: largest root mean square of a weight's update / lr")
    parameter_scaling: bool = Field(
        False, description="adafactor: steps in proportion to the size of the weights")
    warmup_steps: int = Field(50, ge=0)
    schedule: Schedule = Field(
        "cosine", description="after the warm-up; exponential: Parti's, halving: DALL-E's")
    final_lr_ratio: float = Field(
        0.05, ge=0, le=1, description="lr at the end / peak lr, for cosine, exponential and linear")
    decay_start_step: int | None = Field(
        None, ge=0, description="exponential: constant up to this step; "
                                "none = no longer than the warm-up")
    halve_at_steps: tuple[int, ...] = Field(
        (), description="halving: the steps from which lr is half of what it was")
    gradient_clipping: float = Field(
        1.0, ge=0, description="largest global gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        warmup = self.warmup_steps
        # ratio ** progress: with 0 the rate would fall from the peak to 0 in a single step
        if self.schedule == "exponential" and not self.final_lr_ratio:
            raise ValueError("final_lr_ratio 0 is never reached by schedule 'exponential'; give "
                             "one above 0, or use 'linear'")
        if self.decay_start_step is not None and self.decay_start_step < warmup:
            raise ValueError(f"decay_start_step {self.decay_start_step} is before the end of the "
                             f"warm-up (warmup_steps {warmup}); raise it, or lower warmup_steps")
        if self.schedule == "inverse_sqrt" and not warmup:
            raise ValueError("schedule 'inverse_sqrt' with warmup_steps 0 is no learning rate, "
                             "being lr * sqrt(warmup_steps / step); give 1 or more")

        halvings = list(self.halve_at_steps)
        if self.schedule == "halving" and not halvings:
            raise ValueError("schedule 'halving' needs halve_at_steps, the steps at which lr is "
                             "halved; or use 'constant'")
        # step 0 has no rate before it to halve, and during the warm-up the schedule is not read
        too_early = bool(halvings) and halvings[0] < max(1, warmup)
        if too_early or halvings != sorted(set(halvings)):
            raise ValueError(f"halve_at_steps {halvings} must rise, and begin no earlier than the "
                             f"warm-up ends (warmup_steps {warmup}) or step 1; reorder or drop "
                             "those that do not")
        return self

    def check_in_run(self, section: str, steps: int, zero_stage: int) -> None:
        """Refuse options that a run of `steps` would not read, not reach or cannot do.

        section: name of this section in the run's config, for the ValueError.
        """
        for option, (choice, readers) in self.READ_BY.items():
            value = getattr(self, option)
            chosen = getattr(self, choice)
            default = type(self).model_fields[option].default
            # a default is no mistake: every merged config holds all keys
            if value != default and chosen not in readers:
                raise ValueError(f"{section}.{option} {value} is not read with {section}.{choice} "
                                 f"'{chosen}', only with {', '.join(readers)}; leave it out "
                                 f"(default {default})")

        # 0, of one that is not given, is before the end of every run
        latest = {"decay_start_step": self.decay_start_step or 0,
                  "halve_at_steps": max(self.halve_at_steps, default=0)}
        for option, step in latest.items():
            if step >= steps:
                raise ValueError(f"{section}.{option} {step} is not before the end of the run "
                                 f"(train.steps {steps}); lower it")

        if self.name == "adafactor" and zero_stage > 0:
            raise ValueError(f"{section}.name 'adafactor' with deepspeed.zero_stage {zero_stage}: "
                             "that makes vectors of the weights, whose second moment has no "
                             "factors; use deepspeed.zero_stage 0, or 'adamw'")


class DiscriminatorOptimConfig(OptimConfig):
    """The discriminator's optimizer; its steps count from adversarial.start_step."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = (0.5, 0.9)  # as taming-transformers trains its discriminator
    weight_decay: float = Field(
        0.0, ge=0, description="on matrices; never on gains, biases and embeddings")
    warmup_steps: int = Field(0, ge=0)
    schedule: Schedule = "constant"
