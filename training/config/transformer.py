"""The `model:` section of a transformer's recipe: a preset or a kind, and fields that override it.

Fields that follow from the tokenizers and the data (`seq2seq.config.DERIVED`) are filled in by the
training script.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from seq2seq import (
    PRESETS,
    TRANSFORMER_KINDS,
    DecoderOnlyConfig,
    EncoderDecoder,
    Seq2SeqConfig,
    TransformerConfig,
)
from seq2seq.config import DERIVED
from tokenloom_common.config import StrictConfig, explain
from tokenloom_common.errors import choose, nearest_name
from training.config.optional import optional_fields

DEFAULT_PRESET = "small"
KIND_HELP = f"one of {', '.join(TRANSFORMER_KINDS)}; follows from the preset"

PLACEHOLDERS = {"text_vocab_size": 300, "text_length": 16, "codebook_size": 16, "grid": (4, 4)}
"""Stand in for the derived fields while a recipe is checked, before any data is opened."""
FEATURE_PLACEHOLDERS = {"text_vocab_size": None, "text_feature_width": 8}


class TransformerSettings(StrictConfig):
    """The fields that every family's section has; each family adds its own."""

    preset: str | None = Field(
        DEFAULT_PRESET, description=f"one of {', '.join(PRESETS)}; none = the family's defaults")
    kind: str = Field(EncoderDecoder.kind, description=KIND_HELP)

    def resolved(self) -> dict[str, Any]:
        """Return the preset's values, overridden by those given here, without `kind`."""
        values = dict(PRESETS[self.preset]) if self.preset else {}
        values.pop("kind", None)
        return {**values, **self.model_dump(exclude={"preset", "kind"}, exclude_none=True)}

    def build(self, derived: dict[str, Any]) -> TransformerConfig:
        """Build the whole config from this section and derived fields. UserError if impossible."""
        config_class = TRANSFORMER_KINDS[self.kind].config_class
        config = config_class.parse({**self.resolved(), **derived}, "model")
        return config  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check_possible(self) -> TransformerSettings:
        """Refuse fields that contradict one another now, not after the data was opened."""
        values = {**PLACEHOLDERS, **self.resolved()}
        if values.get("encoder_layers") == 0:  # is possible with text features only
            values.update(FEATURE_PLACEHOLDERS)

        config_class = TRANSFORMER_KINDS[self.kind].config_class
        try:
            config_class.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(config_class, error)) from None
        return self


_EncoderDecoder = optional_fields(Seq2SeqConfig, TransformerSettings, DERIVED)
_DecoderOnly = optional_fields(DecoderOnlyConfig, TransformerSettings, DERIVED)


# The second base, which the first one has too, tells type checkers what every section has.
class EncoderDecoderSettings(_EncoderDecoder, TransformerSettings):  # type: ignore[misc,valid-type]
    """The section of an encoder-decoder transformer."""

    kind: Literal["encoder_decoder"] = Field("encoder_decoder", description=KIND_HELP)


class DecoderOnlySettings(_DecoderOnly, TransformerSettings):  # type: ignore[misc,valid-type]
    """The section of a decoder-only transformer."""

    kind: Literal["decoder_only"] = Field("decoder_only", description=KIND_HELP)


TransformerSection = Annotated[EncoderDecoderSettings | DecoderOnlySettings,
                               Field(discriminator="kind")]


def with_family(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in `preset` and `kind` of a section as written.

    ValueError, one line, if they are unknown or disagree.
    """
    # a kind alone asks for the family's own defaults, not for the default preset's
    default_preset = None if "kind" in values else DEFAULT_PRESET
    name = values.get("preset", default_preset)
    if name is not None and name not in PRESETS:
        raise ValueError(f"unknown model.preset '{name}'{nearest_name(str(name), PRESETS)}")

    presets_kind = PRESETS[name]["kind"] if name is not None else EncoderDecoder.kind
    kind = str(values.get("kind") or presets_kind)
    if name is not None and kind != presets_kind:
        raise ValueError(f"model.preset '{name}' is of kind {presets_kind}, not {kind}; "
                         "leave model.kind out")
    choose(TRANSFORMER_KINDS, kind, "model.kind")
    return {**values, "preset": name, "kind": kind}


def read_settings(values: dict[str, Any]) -> EncoderDecoderSettings | DecoderOnlySettings:
    """Read a `model:` section as written. ValueError for an unknown name or an impossible value."""
    values = with_family(values)
    family = DecoderOnlySettings if values["kind"] == "decoder_only" else EncoderDecoderSettings
    return family.model_validate(values)
