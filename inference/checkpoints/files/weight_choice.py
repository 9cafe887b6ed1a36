"""Choose one of a checkpoint's sets of weights, and say which one it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from inference.checkpoints.files.weight_sets import (
    WeightSet,
    WeightsLayout,
    averages_without_names,
    find_sets,
)
from tokenloom_common.errors import UserError

RAW, AVERAGE = "raw", "ema"  # values of --weight-set beside the places that a file has
# a second stage was trained on the codes of its first stage's raw weights
_RAW_PARTS = ("first_stage_model.",)
# a codebook by moving average is no learned parameter, so averages of the parameters lack it
_CODEBOOK = "quantize.embed"


@dataclass(frozen=True)
class ChosenWeights:
    """One set of weights. notes: which one, if the file holds several."""

    tensors: dict[str, Tensor] = field(repr=False)
    is_average: bool = False
    notes: tuple[str, ...] = ()


def choose_set(payload: Mapping, layout: WeightsLayout, wanted: str | None, where: Path
               ) -> ChosenWeights | None:
    """The set that `wanted` names, or by default the one that the project's own sampler takes.

    None if the file holds none of this kind of model. UserError if it lacks the wanted one.
    """
    sets = find_sets(payload, layout, where)
    if not sets:
        return None
    unnamed = [f"`{place}`, an average without names, which is not converted"
               for place in averages_without_names(payload)]

    sets = _in_order(sets, layout)
    if wanted is None:
        chosen = _default(sets, layout)
    else:
        chosen = _wanted(wanted, sets, unnamed, where)
    tensors, completed = _with_codebook(chosen, sets)

    notes = []
    others = [other for other in sets if other is not chosen and _is_another(other, chosen)]
    also_there = [_offer(other, sets) for other in others] + unnamed
    if also_there:
        kind = "average" if chosen.is_average else "raw weights"
        notes.append(f"{where.name}: took the {kind} {chosen.label}; also there: "
                     f"{', '.join(also_there)}")
    if completed:
        notes.append(f"{where.name}: the average lacks {', '.join(completed)}; they are taken from "
                     "the raw weights")
    return ChosenWeights(tensors, chosen.is_average, tuple(notes))


def _in_order(sets: Sequence[WeightSet], layout: WeightsLayout) -> list[WeightSet]:
    """The sets with the preferred model of a larger one first, and its best container first."""
    def rank(found: WeightSet) -> tuple[int, int]:
        prefixes, containers = layout.prefixes, layout.containers
        of_part = prefixes.index(found.part) if found.part in prefixes else len(prefixes)
        if not found.keys:
            return of_part, -1
        key = found.keys[0]
        return of_part, containers.index(key) if key in containers else len(containers)

    return sorted(sets, key=rank)


def _default(sets: Sequence[WeightSet], layout: WeightsLayout) -> WeightSet:
    part = sets[0].part
    prefers_average = layout.prefers_average and part not in _RAW_PARTS
    candidates = [found for found in sets if found.part == part]
    return _first(candidates, prefers_average) or candidates[0]


def _first(sets: Sequence[WeightSet], is_average: bool) -> WeightSet | None:
    return next((found for found in sets if found.is_average == is_average), None)


def _wanted(wanted: str, sets: Sequence[WeightSet], unnamed: Sequence[str], where: Path
            ) -> WeightSet:
    """The set called `wanted`. UserError that lists the sets if there is none."""
    for found in sets:
        if found.place == wanted != "":
            return found
    several = len(sets) > 1 or bool(unnamed)
    # a set by itself is not known to be raw: its file may hold nothing but an average
    if wanted == AVERAGE or (wanted == RAW and several):
        first = _first(sets, is_average=wanted == AVERAGE)
        if first is not None:
            return first

    if not several:
        raise UserError(f"--weight-set {wanted}: {where} holds one set of weights only, "
                        f"{sets[0].label}; leave --weight-set out")
    held = [f"{found.label} ({AVERAGE if found.is_average else RAW})" for found in sets]
    raise UserError(f"--weight-set {wanted}: {where} holds no such set of weights; it holds "
                    f"{', '.join([*held, *unnamed])}")


def _offer(other: WeightSet, sets: Sequence[WeightSet]) -> str:
    """A set with the option that takes it."""
    value = other.place
    for name in (RAW, AVERAGE):
        if other is _first(sets, is_average=name == AVERAGE):
            value = name
    return f"{other.label} (--weight-set {shlex.quote(value)})"


def _with_codebook(chosen: WeightSet, sets: Sequence[WeightSet]
                   ) -> tuple[dict[str, Tensor], list[str]]:
    """The set's tensors, and the names of a codebook's that only the raw weights have."""
    raw = _first([found for found in sets if found.part == chosen.part], is_average=False)
    if raw is None or not chosen.is_average:
        return chosen.tensors, []
    completed = [name for name in raw.tensors
                 if name.startswith(_CODEBOOK) and name not in chosen.tensors]
    return chosen.tensors | {name: raw.tensors[name] for name in completed}, completed


def _is_another(other: WeightSet, chosen: WeightSet) -> bool:
    """Whether it is another set of weights for the chosen model, not the same tensors again."""
    shared = other.tensors.keys() & chosen.tensors.keys()
    pairs = [(other.tensors[name], chosen.tensors[name]) for name in shared]
    alike = sum(one.shape == two.shape for one, two in pairs)
    if other.part != chosen.part and 2 * alike < len(chosen.tensors):
        return False
    # torch.save keeps two containers of one state dict as two names of one storage
    return any(one.data_ptr() != two.data_ptr() for one, two in pairs)
