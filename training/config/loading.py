"""From a recipe and a command line to a config, and the help that lists every key."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tokenloom_common.config import (
    StrictConfig,
    dotted_names,
    merge,
    nearest_key,
    read_mapping,
    sections,
)
from tokenloom_common.errors import UserError, nearest_name

Config = TypeVar("Config", bound=StrictConfig)

RECIPES = Path(__file__).parents[1] / "recipes"


def load_config(config_class: type[Config], argv: Sequence[str], prog: str, description: str
                ) -> Config:
    """Build a run's config from argv: `--config FILE`, then `--section.key value` overrides.

    `--help` prints every key with its default; `--local_rank` (added by the launcher) is ignored.
    UserError on any mistake.
    """
    try:
        return _load(config_class, argv, prog, description)
    except UserError as error:
        # every process has the same arguments, so only the first one prints the error
        error.raised_everywhere = True  # type: ignore[attr-defined]
        raise


def _load(config_class: type[Config], argv: Sequence[str], prog: str, description: str) -> Config:
    values: dict[str, Any] = {}
    overrides: list[tuple[str, str]] = []
    items = list(argv)
    while items:
        flag = items.pop(0)
        if flag in ("-h", "--help"):
            print(help_text(config_class, prog, description))
            raise SystemExit(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument '{flag}'; options are --config FILE and "
                            "--section.key value")

        name, has_value, value = flag[2:].partition("=")
        if not has_value:
            if not items:
                raise UserError(f"--{name} needs a value")
            value = items.pop(0)

        if name in ("local_rank", "local-rank"):  # DeepSpeed's and torch's spelling
            continue
        if name == "config":  # a later recipe goes over an earlier one
            values = merge(values, read_mapping(find_recipe(value)))
        else:
            overrides.append((name, value))

    # a kind or preset replaces its section, so it is applied before what is set in the section;
    # the sort is stable, so of two values for one key the later one counts
    overrides.sort(key=lambda override: not override[0].endswith((".kind", ".preset")))
    valid = dotted_names(config_class)  # checked here, so that the message names the option
    for name, text in overrides:
        if name not in valid:
            raise UserError(f"unknown option '--{name}'{nearest_key(config_class, name)}")
        if name.endswith(".kind"):
            values = _with_default_kind(config_class, values, name)
        value = text if _is_text(config_class, name) else _scalar(name, text)
        values = merge(values, _nested(name, value))
    return config_class.parse(values, "config")


def _with_default_kind(config_class: type[BaseModel], values: dict[str, Any], name: str
                       ) -> dict[str, Any]:
    """Write the default `kind` into a section without one, so that naming it replaces nothing."""
    default: Any = None  # of the section that the parts so far lead to
    section: Any = values
    for part in name.split(".")[:-1]:
        owner = config_class if default is None else type(default)
        default = owner.model_fields[part].get_default(call_default_factory=True)
        section = section.get(part) if isinstance(section, dict) else None

    if not isinstance(section, dict) or {"kind", "preset"} & set(section):
        return values
    return merge(values, _nested(name.removesuffix(".kind"), {**section, "kind": default.kind}))


def find_recipe(name: str) -> Path:
    """Find a recipe file by its path, or by its bare name among the shipped recipes."""
    path = Path(name)
    if path.exists():  # a file of the user's counts more than a shipped one of the same name
        return path

    shipped = RECIPES / (path.name if path.suffix else f"{path.name}.yaml")
    if path.parent == Path(".") and shipped.is_file():
        return shipped
    names = sorted(recipe.name for recipe in RECIPES.glob("*.yaml"))
    raise UserError(f"--config {name}: no such file{nearest_name(path.name, names)}")


def _is_text(config_class: type[BaseModel], name: str) -> bool:
    """Whether a key holds text, which is not YAML: '20261121' and 'a #2' are folder names."""
    first, _, rest = name.partition(".")
    if first not in config_class.model_fields:  # a key of another family, or a preset
        return False
    annotation = config_class.model_fields[first].annotation
    if rest:
        return any(_is_text(section, rest) for section in sections(annotation))
    # a kind is a Literal in the families of a union, and as YAML 'null' would be no kind at all
    return first == "kind" or annotation in (str, str | None)


def _scalar(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""  # YAML takes nothing for null
    except yaml.YAMLError:
        raise UserError(f"--{name}: cannot read the value {text!r}") from None


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):  # "a.b" -> {"a": {"b": value}}
        value = {part: value}
    return value


def help_text(config_class: type[BaseModel], prog: str, description: str) -> str:
    """Format usage, description and every key with its default and meaning."""
    lines = [f"usage: {prog} --config FILE [--section.key value ...]", "",
             textwrap.dedent(description).strip(), "",
             "keys (defaults < --config FILE < command line):"]
    return "\n".join(lines + _help_lines(config_class, ""))


def _help_lines(config_class: type[BaseModel], prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in config_class.model_fields.items():
        families = sections(field.annotation)
        for family in families:
            if len(families) > 1:
                kind = family.model_fields["kind"].get_default()
                lines.append(f"  with --{prefix}{name}.kind {kind}:")
            lines += _help_lines(family, f"{prefix}{name}.")
        if not families:
            lines.append(_help_line(f"--{prefix}{name}", field))
    return lines


def _help_line(option: str, field: FieldInfo) -> str:
    default = "required"
    if not field.is_required():
        default = f"default {field.get_default(call_default_factory=True)}"
    meaning = " ".join((field.description or "").split())  # docstrings of fields have line ends
    return f"  {option}  {meaning} ({default})" if meaning else f"  {option}  ({default})"


def dump_config(config: StrictConfig) -> str:
    """Format the merged config as YAML that --config reads again."""
    # in the order of the fields, which is the order of --help
    return yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
