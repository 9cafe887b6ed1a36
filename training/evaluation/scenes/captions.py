"""Exact compositional accuracy: do images of coloured shapes show what their captions say?

A caption of `training.data.builders.scenes.describe` is a complete statement about a scene, so
each part of it is right or wrong of what `read_scene` sees.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from tokenloom_common.errors import UserError
from training.data.builders.scenes import (
    COLORS,
    COMBINATIONS,
    NUMBERS,
    OPPOSITE,
    SHAPES,
    Combination,
    Thing,
)
from training.evaluation.scenes.reader import Seen, read_scene

LARGE_FROM = 0.45  # the size from which `describe` calls a thing large
KINDS = ("one object", "count", "relation", "pair")
_DIRECTIONS = {  # x, y; y grows downwards
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}


class Wanted(NamedTuple):
    """A caption's meaning.

    relation: where objects[0] lies as seen from objects[1]. relation, size: "" if not asked for.
    """

    objects: tuple[Combination, ...]
    relation: str = ""
    size: str = ""

    @property
    def kind(self) -> str:
        """One of KINDS; a pair is two different objects without a relation."""
        if len(self.objects) == 1:
            return "one object"
        if self.relation:
            return "relation"
        return "pair" if len(set(self.objects)) > 1 else "count"


@dataclass(frozen=True)
class Verdict:  # not a NamedTuple, which has a method `count`
    """Whether an image shows what a caption says, part by part; None: the caption does not say."""

    all: bool  # everything below, with each colour on its own shape, and nothing else
    color: bool  # the colours are the ones asked for, each as often as asked
    shape: bool  # the same of the shapes
    count: bool  # exactly as many things as asked; "a red circle" asks for one
    relation: bool | None  # see _relation_holds
    size: bool | None  # the largest thing is as large as the word says


# ---- captions ----

# words -> meaning, for every word that `describe` may use
_PHRASES: dict[str, Combination] = {
    Thing(shape, color, 0, 0, 0).words: (color, shape) for color, shape in COMBINATIONS}
_PLURALS = {f"{shape}es" if shape == "cross" else f"{shape}s": shape for shape in SHAPES}
_COUNTS = {name: number for number, name in NUMBERS.items()}
_COUNTS |= {str(number): number for number in NUMBERS}


def _group(name: str, words: Iterable[str]) -> str:
    """A named group of a regular expression that matches one of the words."""
    alternatives = "|".join(re.escape(word) for word in words)
    return f"(?P<{name}>{alternatives})"


def _caption_forms() -> list[re.Pattern[str]]:
    """Every form of a caption that `describe` writes."""
    first = _group("first", _PHRASES)
    second = _group("second", _PHRASES)
    relation = _group("relation", OPPOSITE)
    color = _group("color", COLORS)
    plain = f"{color} {_group('shape', SHAPES)}"
    many = f"{_group('number', _COUNTS)} {color} {_group('shapes', _PLURALS)}"
    size = _group("size", ("large", "small"))
    # no two forms match the same caption with another meaning, so that their order is free
    forms = [
        first,
        f"one {plain}",
        f"a {size} {plain}",
        f"a picture of {first}",
        f"{first} on a white background",
        many,
        f"a picture of {many}",
        f"{many} on a white background",
        f"{first} (that is )?{relation} {second}",
        f"there is {first} {relation} {second}, on white",
        f"{first} and {second}",
    ]
    return [re.compile(form) for form in forms]


_FORMS = _caption_forms()


def parse_caption(caption: str) -> Wanted:
    """Parse a caption of one of the forms of `describe`. UserError that names it otherwise."""
    matches = (form.fullmatch(caption) for form in _FORMS)  # a generator: the first hit ends it
    match = next(filter(None, matches), None)
    if match is None:
        raise UserError(f"caption '{caption}': not of a form of the shapes data, such as 'a red "
                        "circle', 'two red circles', 'a red circle above a blue star' or 'a red "
                        "circle and a blue star'")
    words = match.groupdict()
    if "number" in words:
        combination = (words["color"], _PLURALS[words["shapes"]])
        return Wanted((combination,) * _COUNTS[words["number"]])
    if "color" in words:
        combination = (words["color"], words["shape"])
        return Wanted((combination,), size=words.get("size", ""))

    objects = tuple(_PHRASES[words[name]] for name in ("first", "second") if name in words)
    if len(set(objects)) < len(objects):
        raise UserError(f"caption '{caption}': names {words['first']} twice; the two things of a "
                        "caption must differ")
    return Wanted(objects, relation=words.get("relation", ""))


# ---- verdicts ----

def check(seen: Sequence[Seen], wanted: Wanted) -> Verdict:
    """Compare what is seen with a caption. A thing too many is an error of count, color, shape."""
    asked_colors = Counter(color for color, _ in wanted.objects)
    asked_shapes = Counter(shape for _, shape in wanted.objects)
    relation = _relation_holds(seen, wanted) if wanted.relation else None
    size = _largest_is(seen, wanted.size) if wanted.size else None
    # color and shape may each be right while the colours are on the wrong shapes
    bound = Counter(thing.combination for thing in seen) == Counter(wanted.objects)
    return Verdict(
        all=bound and relation is not False and size is not False,
        color=Counter(thing.color for thing in seen) == asked_colors,
        shape=Counter(thing.shape for thing in seen) == asked_shapes,
        count=len(seen) == len(wanted.objects),
        relation=relation,
        size=size,
    )


def _relation_holds(seen: Sequence[Seen], wanted: Wanted) -> bool:
    """Whether the two things that fit the caption's objects best lie as asked.

    Best: most of the four colours and shapes right, at least one of each object; so a wrong colour
    is not also a wrong relation. Where several pairs fit equally, as when two things swapped their
    colours, it must hold for each of them.
    """
    first, second = wanted.objects
    holds_by_fit: dict[int, list[bool]] = {}
    for thing, other in itertools.permutations(seen, 2):
        fits = (_fit(thing, first), _fit(other, second))
        if all(fits):
            holds = _lies(thing, other, wanted.relation)
            holds_by_fit.setdefault(sum(fits), []).append(holds)
    if not holds_by_fit:
        return False
    return all(holds_by_fit[max(holds_by_fit)])


def _fit(thing: Seen, combination: Combination) -> int:
    """0 to 2: how many of color and shape are right."""
    color, shape = combination
    return (thing.color == color) + (thing.shape == shape)


def _lies(thing: Seen, other: Seen, relation: str) -> bool:
    """Whether a thing lies above another by more than it lies to a side; so for all relations."""
    right, down = _DIRECTIONS[relation]
    x = thing.x - other.x
    y = thing.y - other.y
    along = x * right + y * down
    across = abs(x * down) + abs(y * right)
    return along > across


def _largest_is(seen: Sequence[Seen], word: str) -> bool:
    if not seen:
        return False
    # a thing too many is an error of count; the word is about the one that was asked for
    largest = max(thing.size for thing in seen)
    return (largest > LARGE_FROM) == (word == "large")


# ---- accuracy ----

def compositional_accuracy(pictures: Sequence[np.ndarray],
                           captions: Sequence[str]) -> dict[str, Any]:
    """Share of images, uint8 [S, S, 3] each, that show what their captions say.

    {"all": {"share": 0.5, "captions": 8}, ..., "kinds": {"count": {"all": ...}, ...}}: an entry
    for each part of a Verdict, with the number of captions that ask for it (share None where none
    does), overall and for each of KINDS. UserError if a caption is of none of the forms, if the
    numbers of images and captions differ, or if there are none.
    """
    if len(pictures) != len(captions) or not len(captions):
        raise UserError(f"{len(pictures)} pictures and {len(captions)} captions: must be equally "
                        "many, and at least one")
    seen = [read_scene(pixels) for pixels in pictures]
    return accuracy(seen, [parse_caption(caption) for caption in captions])


def accuracy(seen: Sequence[Sequence[Seen]], asked: Sequence[Wanted]) -> dict[str, Any]:
    """compositional_accuracy of images and captions that were read before."""
    verdicts: list[Verdict] = []
    by_kind: dict[str, list[Verdict]] = {kind: [] for kind in KINDS}
    for things, wanted in zip(seen, asked, strict=True):
        verdict = check(things, wanted)
        verdicts.append(verdict)
        by_kind[wanted.kind].append(verdict)
    report = _shares(verdicts)
    report["kinds"] = {kind: _shares(own) for kind, own in by_kind.items()}
    return report


def _shares(verdicts: list[Verdict]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for field in fields(Verdict):
        values = [getattr(verdict, field.name) for verdict in verdicts]
        answers = [value for value in values if value is not None]
        share = sum(answers) / len(answers) if answers else None
        report[field.name] = {"share": share, "captions": len(answers)}
    return report
