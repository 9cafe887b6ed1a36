"""What a conversion is: for each tensor of one of our models, which of theirs it is made of.

Nothing is built to convert: shapes are compared on the meta device, then each tensor is made, written and forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.memory.meta_device import build_on_meta
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import PretrainedModule, Undrawn, write_config
from tokenloom_common.tensor_writer import write_shards

LISTED = 5  # names of each kind of problem that an error shows
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def only(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


class Rule(NamedTuple):
    """How one of our tensors is made: `make` of their tensors `sources`, in that order. It also runs on the meta device."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = only


@dataclass(frozen=True)
class ConvertedPart:
    """A model that is not built: its class and config, a rule for each name of its state dict, and their tensors.

    ignored: patterns of their names that no rule needs and that do not matter. notes: what was assumed or left out, each a
    line.
    """

    model_class: type[PretrainedModule]
    config: Any
    rules: Mapping[str, Rule]
    weights: Mapping[str, Tensor]
    where: Path
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def built_on_meta(self) -> PretrainedModule:
        """The model without its numbers."""
        return build_on_meta(self.model_class, self.config)

    def check(self) -> None:
        """UserError that lists up to five missing, unexpected and mis-shaped tensors, before anything is written."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.built_on_meta().state_dict().items()}
        assert wanted.keys() == self.rules.keys(), sorted(wanted.keys() ^ self.rules.keys())[:LISTED]
        needed = {source for rule in self.rules.values() for source in rule.sources}
        missing = sorted(needed - self.weights.keys())
        unexpected = sorted(name for name in self.weights.keys() - needed
                            if not any(fnmatch(name, pattern) for pattern in self.ignored))
        whole = [name for name, rule in self.rules.items() if not set(missing) & set(rule.sources)]
        wrong = [problem for name in whole for problem in self._misfit(self.rules[name], wanted[name])]
        problems = [_listed(what, names) for what, names in
                    (("missing", missing), ("unexpected", unexpected), ("mis-shaped", list(dict.fromkeys(wrong)))) if names]
        if problems:
            raise UserError(f"{self.where}: does not hold the tensors of this kind of model: {'; '.join(problems)}")

    def _misfit(self, rule: Rule, wanted: tuple[int, ...]) -> Iterable[str]:
        sources = [self.weights[name] for name in rule.sources]
        shapes = " and ".join(f"{name} {list(tensor.shape)}" for name, tensor in zip(rule.sources, sources, strict=True))
        if any(tensor.dtype not in FLOATS for tensor in sources):
            yield f"{shapes} of {', '.join(str(t.dtype).removeprefix('torch.') for t in sources)} instead of floats"
            return
        if len({tensor.dtype for tensor in sources}) > 1:
            yield f"{shapes} of different types"
            return
        try:
            found = tuple(rule.make(*(tensor.to("meta") for tensor in sources)).shape)
        except (RuntimeError, IndexError, ValueError):
            yield f"{shapes}, which do not go together"
            return
        if found != wanted:
            yield f"{shapes}, which give {list(found)} instead of {list(wanted)}"

    def tensor(self, name: str) -> Tensor:
        """One of our tensors, made of theirs. UserError for a number that is none: a training that broke down."""
        rule = self.rules[name]
        made = rule.make(*(self.weights[source] for source in rule.sources))
        if made.is_floating_point() and made.numel() and not all(end.isfinite() for end in made.aminmax()):  # no copy
            raise UserError(f"{self.where}: {', '.join(rule.sources)} holds numbers that are not finite (nan or inf); give a "
                            "checkpoint from before its training broke down, or download it again")
        return made

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor on the meta device, in the type that it is written in."""
        return {name: rule.make(*(self.weights[source].to("meta") for source in rule.sources)).to("meta")
                for name, rule in self.rules.items()}

    def write(self, folder: Path) -> None:
        """config.json and safetensors into an existing folder, tensor by tensor. UserError as in `check`."""
        self.check()
        write_config(self.model_class.kind, self.config, folder)
        write_shards(folder, self.shapes(), self.tensor)

    def load(self) -> PretrainedModule:
        """The model in memory, float32, eval mode. UserError as in `check`."""
        self.check()
        with Undrawn():
            model = self.model_class(self.config)
        model.load_state_dict({name: self.tensor(name) for name in self.rules})
        return model.eval()


def multiplier(inner: int, width: int) -> float:
    """The factor whose product with the width, rounded down, is exactly `inner`."""
    factor = inner / width
    while int(width * factor) < inner:
        factor = math.nextafter(factor, math.inf)
    return factor


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what} ({', '.join(names[:LISTED])}{more})"


def tensor_names(model_class: type[PretrainedModule], config: Any) -> list[str]:
    """The names of a model's state dict, without its numbers."""
    return list(build_on_meta(model_class, config).state_dict())
