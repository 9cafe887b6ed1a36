"""Config classes with every field optional: what a recipe may override of a preset."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from typing import Any, Optional, TypeVar

from pydantic import create_model

from tokenloom_common.config import StrictConfig

Base = TypeVar("Base", bound=StrictConfig)


def optional_fields(config_class: type[StrictConfig], base: type[Base], without: Collection[str]
                    ) -> type[Base]:
    """Make a subclass of `base` with the fields of `config_class`, each None unless given.

    without: names of fields that are left out. Made at run time, so that the type, bounds and
    description of a field are written in one place.
    """
    fields: dict[str, Any] = {}
    for name, info in config_class.model_fields.items():
        if name in without:
            continue
        field = copy(info)  # the original belongs to config_class, which keeps its default
        field.description = f"{info.description or ''}; none = the preset's".removeprefix("; ")
        field.default, field.default_factory = None, None
        fields[name] = (Optional[info.annotation], field)  # noqa: UP045 (made at run time)
    return create_model(f"Optional{config_class.__name__}", __base__=base, **fields)
