"""Strict configs: frozen, every key known, every mistake one line of error that names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tokenloom_common.errors import MissingFileError, UserError, nearest_name, one_line
from tokenloom_common.text_files import read_text_file

MAX_CONFIG_BYTES = 1 << 20  # a config is a page of text; anything larger is another file
MAX_VALUES = 1 << 20  # with YAML aliases expanded: a few lines of them can exceed all memory


class StrictConfig(BaseModel):
    """Base of all configs: immutable, unknown keys refused, validated when built."""

    # protected_namespaces: pydantic would warn of fields that begin with model_
    # use_attribute_docstrings: the help shows the text below a field
    # allow_inf_nan: YAML's .nan and .inf are floats too
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(),
                              allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from plain values. UserError naming `where`, the key, and the nearest valid key."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(cls, error)}") from None

    def plain(self) -> dict[str, Any]:
        """The values as JSON-able plain Python."""
        return self.model_dump(mode="json")


def dotted_names(config_class: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config tree in dotted form: sections and leaves."""
    names: list[str] = []
    for name, field in config_class.model_fields.items():
        names.append(prefix + name)
        families = sections(field.annotation)
        # a section with several families may name a preset, which fills it in when it is read
        if len(families) > 1:
            names.append(f"{prefix}{name}.preset")
        for family in families:
            names += dotted_names(family, f"{prefix}{name}.")
    return list(dict.fromkeys(names))  # families share keys; the order stays for the help


def nearest_key(config_class: type[BaseModel], key: str) -> str:
    """`; did you mean 'x'?` for the valid key closest to an unknown one, or all valid keys."""
    return nearest_name(key, dotted_names(config_class))


def sections(annotation: Any) -> list[type[BaseModel]]:
    """List the config classes that a field of this type can hold: all families of a union, or one.

    Empty for a plain value.
    """
    choices = get_args(annotation) or (annotation,)  # the members of a union; a class has none
    return [one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` over `base`, section by section.

    A section that gets another `kind`, or a `preset`, is replaced: what it held was meant for the
    old one.
    """
    merged = dict(base)
    for key, value in over.items():
        if _same_section(merged.get(key), value):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def _same_section(old: Any, new: Any) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict) or "preset" in new:
        return False
    return "kind" not in new or new["kind"] == old.get("kind")


def explain(config_class: type[BaseModel], error: ValidationError) -> str:
    """A ValidationError in one line: the key, the nearest valid one, what is wrong."""
    # a misspelt key is often missed elsewhere too: the misspelling is what helps
    # (False sorts before True, and min takes the first of equals)
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    outer, inner, valid = _locate(config_class, first["loc"])
    key = f"{outer}{inner}".removesuffix(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest_name(inner, valid)}{more}"
    if first["type"] == "missing":
        return f"missing key '{key}'{more}"

    message = first["msg"].removeprefix("Value error, ")  # pydantic's, before our validators' text
    if not key:  # a rule about several keys
        return f"{message}{more}"
    # our validators name the value themselves
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{key}: {message}{shown}{more}"


def _locate(config_class: type[BaseModel],
            location: tuple[int | str, ...]) -> tuple[str, str, list[str]]:
    """Split an error's location into (outer key, inner key, keys valid in place of the inner one).

    pydantic names the chosen family of a union in the location. It is no key, and the keys of other
    families are not valid inside it: the outer key ends there.
    """
    outer = ""
    inner = ""
    valid = dotted_names(config_class)
    families = [config_class]  # what the part that comes next is a key or a family of
    for part in location:
        kinds = {}
        if len(families) > 1:
            kinds = {family.model_fields["kind"].default: family for family in families}
        if part in kinds:
            families = [kinds[part]]
            valid = dotted_names(families[0])
            outer = f"{outer}{inner}."
            inner = ""
            continue

        inner = f"{inner}.{part}" if inner else str(part)
        field = families[0].model_fields.get(str(part)) if families else None
        families = sections(field.annotation) if field else []
    return outer, inner, valid


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping. UserError with the file's name otherwise."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    # asked before it is read: a path of weights given by mistake is gigabytes
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large for a config (limit "
                        f"{MAX_CONFIG_BYTES:,})")
    text = read_text_file(path)
    try:
        # YAML would take JSON's 1e-06 for a string
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        count = _count_expanded(values, {})
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        # ValueError: JSON, and what YAML takes for a date or a number and Python cannot read
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    if count > MAX_VALUES:
        raise UserError(f"{path}: cannot be read: its aliases stand for more than {MAX_VALUES:,} "
                        "values, or for themselves")
    if values is None:  # an empty YAML file, or comments only
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found "
                        f"{type(values).__name__}")
    return values


def _count_expanded(value: Any, known: dict[int, int]) -> int:
    """Number of values with every alias expanded; more than MAX_VALUES for one inside itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:  # PyYAML gives an alias as the same object
        known[id(value)] = MAX_VALUES + 1  # while it is counted: met again inside itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_expanded(item, known) for item in items)
    return known[id(value)]


def by_dotted_name(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of plain values: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= by_dotted_name(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
