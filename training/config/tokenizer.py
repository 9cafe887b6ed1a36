"""Config of training/train_tokenizer.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tokenizer_image import (
    IMAGE_TOKENIZERS,
    DVAEConfig,
    TokenizerLossConfig,
    ViTVQGANConfig,
    VQGANConfig,
    preset,
)
from tokenizer_image.adversarial import AdversarialConfig
from tokenloom_common.config import StrictConfig, merge
from tokenloom_common.errors import choose
from training.config.optim import DiscriminatorOptimConfig
from training.config.run import DataConfig, RunConfig, TrainConfig
from training.config.start_folders import tokenizer_of_start

DEFAULT_KIND = VQGANConfig().kind

ImageTokenizerSection = Annotated[VQGANConfig | ViTVQGANConfig | DVAEConfig,
                                  Field(discriminator="kind")]


class TokenizerTrainConfig(TrainConfig):
    """Training options that only an image tokenizer has."""

    trained_part: Literal["all", "decoder"] = Field(
        "all", description="decoder: codes stay as init_from has them, "
                           "only the way from codes to pixels learns")


class CodebookHealthConfig(StrictConfig):
    """How the codebook is watched."""

    window: int = Field(
        0, ge=0, description="pictures over which usage and perplexity are counted; 0 = an epoch")
    warn_below: float = Field(
        0.5, ge=0, le=1, description="share of codes in use below which a warning says what to try")


class TokenizerRunConfig(RunConfig):
    """training/train_tokenizer.py: images -> an image tokenizer."""

    data: DataConfig
    init_from: str | None = Field(
        None, description="folder or hub id of a trained image tokenizer, or of a model folder "
                          "that has one: its weights are where this one starts, and model.* is "
                          "taken from there")
    model: ImageTokenizerSection = VQGANConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TokenizerTrainConfig = TokenizerTrainConfig()
    discriminator_optim: DiscriminatorOptimConfig = DiscriminatorOptimConfig()
    codebook: CodebookHealthConfig = CodebookHealthConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_model_from_start(cls, values: Any) -> Any:
        """Use init_from's model where the recipe does not describe one."""
        if not isinstance(values, dict) or values.get("init_from") is None:
            return values
        model = values.get("model") or {}
        if not isinstance(model, dict) or {"kind", "preset"} & set(model):
            return values  # a whole model of the recipe's own, or one that validation refuses
        return {**values, "model": merge(tokenizer_of_start(values), model)}

    @field_validator("model", mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Replace `preset` by its values, and name the kind that decides on the family."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        name = values.pop("preset", None)
        if name is not None:  # the fields beside it override the preset's
            values = merge(preset(str(name)).plain(), values)
        kind = str(values.get("kind", DEFAULT_KIND))
        choose(IMAGE_TOKENIZERS, kind, "model.kind")
        return {**values, "kind": kind}

    @model_validator(mode="after")
    def _check_possible(self) -> TokenizerRunConfig:
        if self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3 shards parameters, and an image tokenizer is "
                             "too small for that; use 0, 1 or 2")
        if self.train.precision == "float16":
            raise ValueError("train.precision float16 is too narrow for distances to codes; use "
                             "bfloat16 or float32")
        if self.train.compile:
            raise ValueError("train.compile: the codebook of an image tokenizer changes itself "
                             "inside a step, which breaks compiled code up; leave it out")

        self.model.check_encodes(self.init_from or "model")  # some published ones only decode
        if self.train.trained_part == "decoder" and self.init_from is None:
            raise ValueError("train.trained_part 'decoder' needs init_from, the tokenizer whose "
                             "codes are kept")
        self._check_losses()
        return self

    def _check_losses(self) -> None:
        # the logit-Laplace likelihood of a dVAE is a reconstruction loss of its own (Ramesh et al.
        # 2021, appendix A.3); with the codes kept, a model has no terms of its own
        has_likelihood = getattr(self.model, "output", None) == "logit_laplace"
        learns_by_likelihood = has_likelihood and self.train.trained_part != "decoder"
        weights = (self.loss.l1_weight, self.loss.l2_weight, self.loss.perceptual_weight)
        if not learns_by_likelihood and not any(weights):
            raise ValueError("loss: no term of the picture has a weight, so there is nothing to "
                             "learn; set l1_weight, l2_weight or perceptual_weight")

        # the first step in which the tokenizer hears of the discriminator
        first = self.adversarial.start_step + self.adversarial.head_start_steps
        if self.adversarial.weight and first >= self.train.steps:
            raise ValueError(f"adversarial.start_step + head_start_steps = {first} is not before "
                             f"the end of the run (train.steps {self.train.steps}); lower them, or "
                             "set adversarial.weight to 0")
