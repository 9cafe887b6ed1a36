"""The `model:` section of a transformer's recipe: a preset or a kind, and the fields that differ from it.

What follows from the tokenizers and the data (`seq2seq.config.DERIVED`) is filled in by the training script.
"""

from __future__ import annotations

from copy import copy
from typing import Any, Optional

from pydantic import Field, ValidationError, create_model

from seq2seq import PRESETS, TRANSFORMER_KINDS, EncoderDecoder, TransformerConfig
from seq2seq.config import DERIVED
from tokenloom_common.config import StrictConfig, explain
from tokenloom_common.errors import choose, nearest_name

DEFAULT_PRESET = "small"
_STAND_INS = {"text_vocab_size": 300, "text_length": 16, "codebook_size": 16, "grid": (4, 4)}
_FEATURES = {"text_vocab_size": None, "text_feature_width": 8}


class TransformerSettings(StrictConfig):
    """A family's own fields, each none unless given; they override the preset's."""

    preset: str | None = Field(DEFAULT_PRESET, description=f"one of {', '.join(PRESETS)}; none = the family's defaults")
    kind: str = Field(EncoderDecoder.kind, description=f"one of {', '.join(TRANSFORMER_KINDS)}; follows from the preset")

    @classmethod
    def variants(cls) -> list[type[StrictConfig]]:
        """The settings of every family: what options there are."""
        return list(SETTINGS.values()) if cls is TransformerSettings else [cls]

    def resolved(self) -> dict[str, Any]:
        """The preset's values, overridden by those given here, without `kind`."""
        base = {k: v for k, v in PRESETS[self.preset].items() if k != "kind"} if self.preset else {}
        return {**base, **self.model_dump(exclude={"preset", "kind"}, exclude_none=True)}

    def build(self, derived: dict[str, Any]) -> TransformerConfig:
        """The whole config, with what follows from tokenizers and data. UserError on an impossible one."""
        return TRANSFORMER_KINDS[self.kind].config_class.parse({**self.resolved(), **derived}, "model")  # type: ignore[return-value]


def _settings(kind: str) -> type[TransformerSettings]:
    fields: dict[str, Any] = {"kind": (str, Field(kind, description=TransformerSettings.model_fields["kind"].description))}
    for name, info in TRANSFORMER_KINDS[kind].config_class.model_fields.items():
        if name not in DERIVED:
            field = copy(info)
            field.description = f"{info.description or ''}; none = the preset's".removeprefix("; ")
            field.default, field.default_factory = None, None
            fields[name] = (Optional[info.annotation], field)  # noqa: UP045 (made at run time)
    return create_model(f"{TRANSFORMER_KINDS[kind].__name__}Settings", __base__=TransformerSettings, **fields)


SETTINGS = {kind: _settings(kind) for kind in TRANSFORMER_KINDS}


def read_settings(values: dict[str, Any]) -> TransformerSettings:
    """A `model:` section as written. ValueError, one line, for an unknown name or an impossible value."""
    values = dict(values)
    name = values.get("preset", None if "kind" in values else DEFAULT_PRESET)
    if name is not None and name not in PRESETS:
        raise ValueError(f"unknown model.preset '{name}'{nearest_name(str(name), PRESETS)}")
    kind = str(values.get("kind") or (PRESETS[name]["kind"] if name else EncoderDecoder.kind))
    if name is not None and kind != PRESETS[name]["kind"]:
        raise ValueError(f"model.preset '{name}' is of kind {PRESETS[name]['kind']}, not {kind}; leave model.kind out")
    choose(TRANSFORMER_KINDS, kind, "model.kind")
    try:
        settings = SETTINGS[kind].model_validate({**values, "kind": kind, "preset": name})
        resolved = settings.resolved()
        text = _FEATURES if resolved.get("encoder_layers") == 0 else {}  # which text ids cannot do without
        TRANSFORMER_KINDS[kind].config_class.model_validate({**_STAND_INS, **text, **resolved})
    except ValidationError as error:
        raise ValueError(explain(SETTINGS[kind], error)) from None
    return settings
