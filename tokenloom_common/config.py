"""Strict configs: frozen, every key known, every mistake one line that names the key and the nearest valid one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tokenloom_common.errors import MissingFileError, UserError, nearest_name

MAX_CONFIG_BYTES = 1 << 20  # a config is a page of text; anything larger is something else
MAX_VALUES = 1 << 20  # in it, every alias of YAML written out: a few lines of them can stand for more than a memory holds


class StrictConfig(BaseModel):
    """Base of all configs: immutable, unknown keys refused, validated when built."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False,
                              use_attribute_docstrings=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from plain values. UserError naming `where`, the key, and the nearest valid key."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(f"{where}: {explain(cls, error)}") from None

    renamed: ClassVar[dict[str, str]] = {}
    """Keys of earlier releases, dotted -> what they are called now."""

    def plain(self) -> dict[str, Any]:
        """The values as JSON-able plain Python."""
        return self.model_dump(mode="json")


def dotted_names(config_class: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a config tree in dotted form: sections and leaves."""
    names: list[str] = []
    for name, field in config_class.model_fields.items():
        names.append(prefix + name)
        families = sections(field.annotation)
        if len(families) > 1:  # a section of several families may name a preset, which fills it in when it is read
            names.append(f"{prefix}{name}.preset")
        for family in families:
            names += dotted_names(family, f"{prefix}{name}.")
    return list(dict.fromkeys(names))


def nearest_key(config_class: type[BaseModel], key: str) -> str:
    """What to say after an unknown key: what it is called now, the nearest valid one, or all of them."""
    now = getattr(config_class, "renamed", {}).get(key)
    return f"; it is called '{now}' now" if now else nearest_name(key, dotted_names(config_class))


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a field of this type can hold: the families of a union, or one; none for a plain value."""
    choices = get_args(annotation) or (annotation,)
    return [one for one in choices if isinstance(one, type) and issubclass(one, BaseModel)]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` over `base`, section by section. A section that gets another `kind`, or a `preset`, is replaced: what it held
    was meant for the old one.
    """
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        goes_on = both and "preset" not in value and value.get("kind", merged[key].get("kind")) == merged[key].get("kind")
        merged[key] = merge(merged[key], value) if goes_on else value
    return merged


def explain(config_class: type[BaseModel], error: ValidationError) -> str:
    """A ValidationError in one line: the key, the nearest valid one, what is wrong."""
    # a misspelt key is often missed elsewhere too: the misspelling is what helps
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    outer, inner, valid = _locate(config_class, first["loc"])
    key = f"{outer}{inner}".removesuffix(".")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest_name(inner, valid)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"missing key '{key}'{more}"
    shown = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"


def _locate(config_class: type[BaseModel], location: tuple[int | str, ...]) -> tuple[str, str, list[str]]:
    """The dotted key of an error's location, in two parts, and the keys that are valid in place of the second one.

    The first part ends where the `kind` of a union chose a family, which pydantic names in the location too: the family is
    no key, and the keys of other families are not valid inside it.
    """
    outer, inner = "", ""
    valid = dotted_names(config_class)
    families = [config_class]
    for part in location:
        kinds = {family.model_fields["kind"].default: family for family in families} if len(families) > 1 else {}
        if part in kinds:
            families = [kinds[part]]
            valid = dotted_names(families[0])
            outer, inner = f"{outer}{inner}.", ""
            continue
        inner = f"{inner}.{part}" if inner else str(part)
        field = families[0].model_fields.get(str(part)) if families else None
        families = sections(field.annotation) if field else []
    return outer, inner, valid


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that holds one mapping. UserError with the file's name otherwise."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large for a config (limit {MAX_CONFIG_BYTES:,})")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        count = _written_out(values, {})
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: JSON, dates and numbers that are none
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if count > MAX_VALUES:
        raise UserError(f"{path}: cannot be read: its aliases stand for more than {MAX_VALUES:,} values, or for themselves")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def _written_out(value: Any, known: dict[int, int]) -> int:
    """How many values there are with every alias written out; more than MAX_VALUES for one that holds itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_VALUES + 1  # until it is counted
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(one, known) for one in inner)
    return known[id(value)]


def by_dotted_name(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of plain values, flat."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(by_dotted_name(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
