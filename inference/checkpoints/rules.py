"""Conversion rules: for each tensor of one of our models, the source tensors that it is made of.

No model is built to convert one: shapes are compared on the meta device, then each tensor is made,
written and freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.memory.meta_device import build_on_meta
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import PretrainedModule, SkipParameterInit, write_config
from tokenloom_common.tensor_writer import write_shards
from tokenloom_common.weights import list_problems

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that our models compute in after a cast; a cast of quantised integers gives no weights."""


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


class Rule(NamedTuple):
    """One of our tensors as `make(*sources)`, which must run on the meta device too."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = unchanged


@dataclass(frozen=True)
class ConvertedPart:
    """A model yet to be built: class, config, a rule per name of its state dict, source tensors.

    where: the source's path, for messages. ignored: fnmatch patterns of source tensors that no rule
    needs. notes: what was assumed or left out, one line each.
    """

    model_class: type[PretrainedModule]
    config: Any
    rules: Mapping[str, Rule]
    weights: Mapping[str, Tensor]
    where: Path
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def built_on_meta(self) -> PretrainedModule:
        """The model on the meta device: shapes without values."""
        return build_on_meta(self.model_class, self.config)

    def check(self) -> None:
        """UserError that lists up to five missing, unexpected and mis-shaped tensors each."""
        state = self.built_on_meta().state_dict()
        # the converter's own mistake, not the user's
        assert state.keys() == self.rules.keys(), sorted(state.keys() ^ self.rules.keys())[:5]

        needed = {source for rule in self.rules.values() for source in rule.sources}
        missing = sorted(needed - self.weights.keys())
        unneeded = sorted(self.weights.keys() - needed)
        unexpected = [name for name in unneeded if not self._is_ignored(name)]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        mis_shaped = self._mis_shaped(shapes)

        problems = list_problems(
            {"missing": missing, "unexpected": unexpected, "mis-shaped": mis_shaped})
        if problems:
            raise UserError(f"{self.where}: does not hold the tensors of this kind of model: "
                            f"{problems}")

    def _is_ignored(self, name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in self.ignored)

    def _mis_shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """A line per group of source tensors that does not give one of our `shapes`."""
        found = []
        for name, rule in self.rules.items():
            if any(source not in self.weights for source in rule.sources):
                continue  # listed as missing
            problem = self._problem(rule, shapes[name])
            if problem is not None and problem not in found:  # q, k and v may share one matrix
                found.append(problem)
        return found

    def _problem(self, rule: Rule, expected: tuple[int, ...]) -> str | None:
        sources = [self.weights[name] for name in rule.sources]
        shown = " and ".join(f"{name} {list(self.weights[name].shape)}" for name in rule.sources)
        dtypes = [tensor.dtype for tensor in sources]
        if not all(dtype in FLOAT_DTYPES for dtype in dtypes):
            names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            return f"{shown} of {', '.join(names)} instead of floats"
        if len(set(dtypes)) > 1:  # torch.cat would promote them silently
            return f"{shown} of different types"

        try:
            made = rule.make(*(tensor.to("meta") for tensor in sources))
        except (RuntimeError, IndexError, ValueError):  # torch.cat, an index, our own _stacked
            return f"{shown}, which do not go together"
        if tuple(made.shape) != expected:
            return f"{shown}, which give {list(made.shape)} instead of {list(expected)}"
        return None

    def tensor(self, name: str) -> Tensor:
        """Make one of our tensors. UserError for nan or inf, as a run that diverged leaves them."""
        made = self._make(self.rules[name], "cpu")
        if made.is_floating_point() and made.numel() > 0:
            # nan if one value is; made.isfinite().all() would allocate a mask of the tensor's size
            smallest, largest = made.aminmax()
            if not (smallest.isfinite() and largest.isfinite()):
                raise UserError(f"{self.where}: {', '.join(self.rules[name].sources)} holds "
                                "numbers that are not finite (nan or inf); give a checkpoint from "
                                "before the run diverged, or download it again")
        return made

    def _make(self, rule: Rule, device: str) -> Tensor:
        # the last .to is for rules without sources, which make their tensor on the CPU
        return rule.make(*(self.weights[source].to(device) for source in rule.sources)).to(device)

    def write(self, folder: Path) -> None:
        """Write config.json and safetensors, one tensor at a time. UserError as in `check`."""
        self.check()
        write_config(self.model_class.kind, self.config, folder)
        # made on the meta device: they have the source's dtypes, which the file keeps
        shapes = {name: self._make(rule, "meta") for name, rule in self.rules.items()}
        write_shards(folder, shapes, self.tensor)

    def load(self) -> PretrainedModule:
        """The model in memory, float32, eval mode. UserError as in `check`."""
        self.check()
        with SkipParameterInit():
            model = self.model_class(self.config)
        # copies into float32; a file's mapped pages in the source's dtype are left alone
        model.load_state_dict({name: self.tensor(name) for name in self.rules})
        return model.eval()


def multiplier(inner: int, width: int) -> float:
    """The feed-forward multiplier m with int(width * m) == inner, as x-transformers computes it."""
    factor = inner / width
    while int(width * factor) < inner:  # the quotient may be rounded down by one bit
        factor = math.nextafter(factor, math.inf)
    return factor


def tensor_names(model_class: type[PretrainedModule], config: Any) -> list[str]:
    """The names of a model's state dict; the model is built on the meta device only."""
    return list(build_on_meta(model_class, config).state_dict())
