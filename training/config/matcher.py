"""The config of training/train_matcher.py."""

from __future__ import annotations

from copy import copy
from typing import Any, Optional

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from inference.scoring.matcher import ImageTowerConfig, MatcherConfig, TextTowerConfig
from seq2seq import PRESETS
from seq2seq.config import DERIVED
from tokenloom_common.config import StrictConfig, explain
from tokenloom_common.errors import nearest_name
from training.config.run import DataConfig, RunConfig
from training.config.text import TextConfig

_WITH_ENCODER = [name for name, values in PRESETS.items() if "encoder_layers" in values]
_STAND_INS = {"text_vocab_size": 300, "text_length": 16}
_FEATURE_STAND_INS = {"text_feature_width": 8, "text_length": 16}


class TextTowerSettings(StrictConfig):
    """The text tower's own fields, each none unless given; they override the preset's. The rest follows from the captions."""

    preset: str | None = Field(None, description="a model.preset of train_seq2seq that has a text encoder, so that it can "
                               "start from this one; none = the defaults of the text tower")

    @classmethod
    def variants(cls) -> list[type[StrictConfig]]:
        """The one class that a `text` section becomes."""
        return [_TextTowerFields]

    def resolved(self) -> dict[str, Any]:
        """The preset's values, overridden by those given here."""
        base = {}
        if self.preset:
            values = {**PRESETS[self.preset], "layers": PRESETS[self.preset]["encoder_layers"]}
            base = {name: value for name, value in values.items() if name in TextTowerConfig.model_fields}
        return {**base, **self.model_dump(exclude={"preset"}, exclude_none=True)}

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in _WITH_ENCODER:
            raise ValueError(f"unknown preset of a text encoder '{name}'{nearest_name(name, _WITH_ENCODER)}")
        return name


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, info in TextTowerConfig.model_fields.items():
        if name not in DERIVED:
            field = copy(info)
            field.default, field.default_factory = None, None
            fields[name] = (Optional[info.annotation], field)  # noqa: UP045 (made at run time)
    return fields


_TextTowerFields = create_model("TextTowerFields", __base__=TextTowerSettings, **_fields())


class MatcherSettings(StrictConfig):
    """The `model:` section: what does not follow from the captions."""

    image: ImageTowerConfig = ImageTowerConfig()
    text: SerializeAsAny[TextTowerSettings] = Field(default_factory=_TextTowerFields)
    embed_dim: int = MatcherConfig.model_fields["embed_dim"]  # type: ignore[assignment]  # the same bounds and words

    @field_validator("text", mode="before")
    @classmethod
    def _text_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        try:
            return _TextTowerFields.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(_TextTowerFields, error)) from None

    def build(self, derived: dict[str, Any]) -> MatcherConfig:
        """The whole config, with what follows from the captions. UserError on an impossible one."""
        return MatcherConfig.parse({"image": self.image.plain(), "embed_dim": self.embed_dim,
                                    "text": {**self.text.resolved(), **derived}}, "model")


class MatcherLossConfig(StrictConfig):
    """Weights of the two objectives (Parti pretrains its text encoder on both: Yu et al. 2022, https://arxiv.org/abs/2206.10789)."""

    contrastive_weight: float = Field(1.0, gt=0, description="of telling the caption of a picture from the others of its batch")
    mlm_weight: float = Field(0.0, ge=0, description="of predicting hidden words of the captions (masked language modelling, "
                              "BERT); needs text ids")


class MatcherRunConfig(RunConfig):
    """training/train_matcher.py: captioned images -> a matcher."""

    data: DataConfig
    text: TextConfig = TextConfig()
    model: MatcherSettings = MatcherSettings()
    loss: MatcherLossConfig = MatcherLossConfig()

    @model_validator(mode="after")
    def _possible(self) -> MatcherRunConfig:
        frozen = self.text.kind == "frozen"
        if self.text.kind == "classes":
            raise ValueError("text.kind classes has no captions to match; use sentencepiece or frozen")
        if self.loss.mlm_weight and frozen:
            raise ValueError("loss.mlm_weight hides text ids, and text.kind frozen has none; set it to 0")
        if frozen and self.data.workers and not self.text.feature_cache:
            raise ValueError("data.workers cannot share a text encoder; name a folder for text.feature_cache, "
                             "or set data.workers to 0")
        if self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3 shards parameters, and a matcher is too small for that; use 0, 1 or 2")
        self.model.build(_FEATURE_STAND_INS if frozen else _STAND_INS)
        return self
