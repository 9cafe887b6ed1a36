"""Config of training/train_matcher.py."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from inference.scoring.matcher import ImageTowerConfig, MatcherConfig, TextTowerConfig
from seq2seq import PRESETS
from seq2seq.config import DERIVED
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import nearest_name
from training.config.optional import optional_fields
from training.config.run import DataConfig, RunConfig
from training.config.text import TextConfig

# a decoder-only preset has no text encoder that a matcher's weights could start
PRESETS_WITH_ENCODER = [name for name, values in PRESETS.items() if "encoder_layers" in values]

ID_PLACEHOLDERS = {"text_vocab_size": 300, "text_length": 16}
"""Stand in for the derived fields while a recipe is checked, before the captions are opened."""
FEATURE_PLACEHOLDERS = {"text_feature_width": 8, "text_length": 16}


class _TextTowerPreset(StrictConfig):
    preset: str | None = Field(
        None, description="a model.preset of train_seq2seq that has a text encoder, so that it can "
                          "start from this one; none = the defaults of the text tower")

    def resolved(self) -> dict[str, Any]:
        """Return the preset's values, overridden by those given here."""
        values: dict[str, Any] = {}
        if self.preset:
            values = {**PRESETS[self.preset], "layers": PRESETS[self.preset]["encoder_layers"]}
            fields = TextTowerConfig.model_fields  # without those of the preset's decoder
            values = {name: value for name, value in values.items() if name in fields}
        return {**values, **self.model_dump(exclude={"preset"}, exclude_none=True)}

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS_WITH_ENCODER:
            raise ValueError(f"unknown preset of a text encoder '{name}'"
                             f"{nearest_name(name, PRESETS_WITH_ENCODER)}")
        return name


# The second base, which the first one has too, tells type checkers what the section has.
_OptionalFields = optional_fields(TextTowerConfig, _TextTowerPreset, DERIVED)


class TextTowerSettings(_OptionalFields, _TextTowerPreset):  # type: ignore[misc,valid-type]
    """Fields of the text tower that override the preset's; the rest follows from the captions."""


class MatcherSettings(StrictConfig):
    """The `model:` section: everything that does not follow from the captions."""

    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerSettings = Field(default_factory=TextTowerSettings)
    # the field itself, so that bounds and description are the same
    embed_dim: int = MatcherConfig.model_fields["embed_dim"]  # type: ignore[assignment]

    def build(self, derived: dict[str, Any]) -> MatcherConfig:
        """Build the whole config from this section and the derived fields.

        UserError on an impossible one.
        """
        values = {"image": self.image.plain(), "embed_dim": self.embed_dim,
                  "text": {**self.text.resolved(), **derived}}
        return MatcherConfig.parse(values, "model")


class MatcherLossConfig(StrictConfig):
    """Weights of the two objectives.

    Parti pretrains its text encoder on both (Yu et al. 2022, https://arxiv.org/abs/2206.10789).
    """

    contrastive_weight: float = Field(
        1.0, gt=0, description="of telling the caption of a picture from the others of its batch")
    mlm_weight: float = Field(
        0.0, ge=0, description="of predicting hidden words of the captions (masked language "
                               "modelling, BERT); needs text ids")


class MatcherRunConfig(RunConfig):
    """training/train_matcher.py: captioned images -> a matcher."""

    data: DataConfig
    text: TextConfig = TextConfig()
    model: MatcherSettings = MatcherSettings()
    loss: MatcherLossConfig = MatcherLossConfig()

    @model_validator(mode="after")
    def _check_possible(self) -> MatcherRunConfig:
        frozen = self.text.kind == "frozen"
        if self.text.kind == "classes":
            raise ValueError("text.kind classes has no captions to match; "
                             "use sentencepiece or frozen")
        if self.loss.mlm_weight and frozen:
            raise ValueError("loss.mlm_weight hides text ids, and text.kind frozen has none; set "
                             "it to 0")
        self.text.check_workers(self.data.workers)
        if self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3 shards parameters, and a matcher is too small "
                             "for that; use 0, 1 or 2")

        # for its checks alone: an impossible model is refused before the data is opened
        self.model.build(FEATURE_PLACEHOLDERS if frozen else ID_PLACEHOLDERS)
        return self
