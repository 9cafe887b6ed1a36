"""The recipe of an image: everything needed to draw it again, as JSON that files carry."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.sampling import SamplingParams
from tokenloom_common.errors import UserError

DIGITAL_SOURCE_TYPE = "trainedAlgorithmicMedia"
"""IPTC's term for generated images."""
MAX_JSON_CHARACTERS = 8 << 20  # of one file: a recipe is a page of text, a grid holds many
MAX_LAYOUT = 1 << 20  # class numbers
MAX_INTEGER = 1 << 63


@dataclass(frozen=True)
class Recipe:
    """Prompt, seed and parameters of one image, and the model that drew it.

    prompt: as it was asked for. revised_prompt: what was drawn instead, None if nothing else.
    model: folder or name, None for the model that ships with Tokenloom.
    model_fingerprint: see `inference.image_files.fingerprint`.
    extra: further facts, JSON values by EXTRA_FIELDS' names.
    """

    prompt: str
    seed: int
    params: SamplingParams
    negative_prompt: str | None = None
    revised_prompt: str | None = None
    model: str | None = None
    model_fingerprint: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn_prompt(self) -> str:
        """The text that the model was given."""
        return self.prompt if self.revised_prompt is None else self.revised_prompt

    def values(self) -> dict[str, Any]:
        """Return the recipe as one flat JSON object, always in one order, without what is None."""
        named = {name: getattr(self, name) for name in _OWN_TEXTS}
        extra = {name: self.extra[name] for name in (*EXTRA_FIELDS, *self.unknown_fields())
                 if name in self.extra}
        values = {"prompt": self.prompt, "seed": self.seed, **self.params.plain(), **named, **extra,
                  "digitalSourceType": DIGITAL_SOURCE_TYPE}
        return {name: value for name, value in values.items() if value is not None}

    def unknown_fields(self) -> list[str]:
        """List the names in `extra` that this version does not know."""
        return [name for name in self.extra if name not in EXTRA_FIELDS]

    def identity(self) -> dict[str, Any]:
        """Return all that decides the image: equal identities are equal images.

        The model counts by its fingerprint, wherever it lies; how an image was chosen among others
        does not count.
        """
        return {name: value for name, value in self.values().items()
                if name not in DESCRIPTIVE_FIELDS}

    def to_json(self) -> str:
        """Return the recipe as JSON in ASCII: every character survives in every file format."""
        return json.dumps(self.values())

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe from JSON that anybody may have written. UserError for what is none."""
        return _recipe(_load(text))


def recipes_to_json(recipes: Sequence[Recipe]) -> str:
    """Return the recipes of a grid's images as a JSON list."""
    return json.dumps([recipe.values() for recipe in recipes])


def parse_recipes(text: str) -> list[Recipe]:
    """Read one recipe, or the list of a grid. UserError for what is none."""
    values = _load(text)
    if not isinstance(values, list):
        return [_recipe(values)]
    if not values:
        raise UserError("the list of recipes is empty")
    return [_recipe(one) for one in values]


# ---- checks of what a file says


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    # True is an int in Python, but no number
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_INTEGER


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_layout(value: Any) -> bool:
    return (isinstance(value, list) and 0 < len(value) <= MAX_LAYOUT
            and all(_is_integer(number) for number in value))


_OWN_TEXTS = ("negative_prompt", "revised_prompt", "model", "model_fingerprint")
EXTRA_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "revision": (_is_text, "text"),
    "weights": (_is_text, "text"),
    "layout": (_is_layout, "a list of class numbers"),
    "score": (_is_number, "a number"),
    "matcher": (_is_text, "text"),
    "image_tokens": (_is_integer, "a whole number"),
    "tokenloom": (_is_text, "text"),
}
"""Names of a recipe's `extra` -> their check, and what it asks for. `image_tokens`: how many there
are; `matcher` gave the `score`; `tokenloom`: the version that drew the image."""
DESCRIPTIVE_FIELDS = {"model", "revision", "score", "matcher", "image_tokens", "tokenloom",
                      "digitalSourceType"}
"""Names of what does not decide an image."""


def _load(text: str) -> Any:
    if len(text) > MAX_JSON_CHARACTERS:
        raise UserError(f"the recipe has {len(text):,} characters, the limit is "
                        f"{MAX_JSON_CHARACTERS:,}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
        raise UserError(f"the recipe is no JSON that can be read ({type(error).__name__})"
                        ) from None


def _recipe(values: Any) -> Recipe:
    if not isinstance(values, dict):
        raise UserError(f"the recipe is no JSON object but a {type(values).__name__}")
    _check(values, "prompt", _is_text, "text", required=True)
    _check(values, "seed", _is_integer, "a whole number of at least 0", required=True)
    for name in _OWN_TEXTS:
        _check(values, name, _is_text, "text")
    for name, (is_valid, expected) in EXTRA_FIELDS.items():
        _check(values, name, is_valid, expected)

    sampling = {name: values[name] for name in SamplingParams.model_fields if name in values}
    missing = [name for name in SamplingParams.model_fields if name not in values]
    if missing:  # a default of ours would be another picture
        raise UserError(f"the recipe has no '{missing[0]}'")
    params = SamplingParams.parse(sampling, "the recipe")

    known = {"prompt", "seed", "digitalSourceType", *_OWN_TEXTS, *SamplingParams.model_fields}
    return Recipe(values["prompt"], values["seed"], params,
                  **{name: values.get(name) for name in _OWN_TEXTS},
                  extra={name: value for name, value in values.items() if name not in known})


def _check(values: dict[str, Any], name: str, is_valid: Callable[[Any], bool], expected: str,
           required: bool = False) -> None:
    if name not in values:
        if required:
            raise UserError(f"the recipe has no '{name}'")
        return
    if not is_valid(values[name]):
        raise UserError(f"the recipe's '{name}' must be {expected}, got "
                        f"{repr(values[name])[:60]}")
