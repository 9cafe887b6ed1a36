"""Does a picture of coloured shapes show what its caption says? Exact compositional accuracy, from what `read_scene` sees.

A caption of `training.data.builders.scenes.describe` is a complete statement about a scene, so each part of it is right or wrong.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
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
_TOWARDS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}  # x, y; y grows downwards


class Wanted(NamedTuple):
    """What a caption asks for. `relation` says where objects[0] lies as seen from objects[1]; "" where it is not asked."""

    objects: tuple[Combination, ...]
    relation: str = ""
    size: str = ""

    @property
    def kind(self) -> str:
        """One of KINDS; a pair is two different objects without a relation."""
        if len(self.objects) == 1:
            return "one object"
        return "relation" if self.relation else "pair" if len(set(self.objects)) > 1 else "count"


@dataclass(frozen=True)
class Verdict:  # no NamedTuple: it has a method `count`
    """What of a caption a picture shows, part by part; None for what the caption does not ask."""

    all: bool  # everything below, with each colour on its own shape, and nothing else on the picture
    color: bool  # the colours are the ones asked for, each as often as asked
    shape: bool  # the same of the shapes
    count: bool  # exactly as many things as asked; "a red circle" asks for one
    relation: bool | None  # see _relation_holds
    size: bool | None  # the largest thing is as large as the word says


# ---- captions ----

_PHRASES: dict[str, Combination] = {Thing(shape, color, 0, 0, 0).words: (color, shape) for color, shape in COMBINATIONS}
_PLURALS = {f"{shape}{'es' if shape == 'cross' else 's'}": shape for shape in SHAPES}
_COUNTS = {word: number for number, name in NUMBERS.items() for word in (name, str(number))}


def _group(name: str, words: Sequence[str] | dict[str, Any]) -> str:
    return f"(?P<{name}>{'|'.join(map(re.escape, words))})"


_FIRST, _SECOND, _RELATION = _group("first", _PHRASES), _group("second", _PHRASES), _group("relation", OPPOSITE)
_PLAIN = f"{_group('color', COLORS)} {_group('shape', SHAPES)}"
_MANY = f"{_group('number', _COUNTS)} {_group('color', COLORS)} {_group('shapes', _PLURALS)}"
_FORMS = [re.compile(form) for form in (
    _FIRST, f"one {_PLAIN}", f"a {_group('size', ('large', 'small'))} {_PLAIN}", f"a picture of {_FIRST}",
    f"{_FIRST} on a white background", _MANY, f"a picture of {_MANY}", f"{_MANY} on a white background",
    f"{_FIRST} (that is )?{_RELATION} {_SECOND}", f"there is {_FIRST} {_RELATION} {_SECOND}, on white",
    f"{_FIRST} and {_SECOND}")]


def parse_caption(caption: str) -> Wanted:
    """A caption in one of the forms of `describe` -> what it asks for; UserError that names the caption otherwise."""
    match = next((match for form in _FORMS if (match := form.fullmatch(caption))), None)
    if match is None:
        raise UserError(f"caption '{caption}': not of a form of the shapes data, such as 'a red circle', 'two red circles', "
                        "'a red circle above a blue star' or 'a red circle and a blue star'")
    words = match.groupdict()
    if "number" in words:
        return Wanted(((words["color"], _PLURALS[words["shapes"]]),) * _COUNTS[words["number"]])
    if "color" in words:
        return Wanted(((words["color"], words["shape"]),), size=words.get("size", ""))
    objects = tuple(_PHRASES[words[name]] for name in ("first", "second") if name in words)
    if len(objects) > len(set(objects)):
        raise UserError(f"caption '{caption}': names {words['first']} twice; the two things of a caption must differ")
    return Wanted(objects, relation=words.get("relation", ""))


# ---- verdicts ----

def check(seen: Sequence[Seen], wanted: Wanted) -> Verdict:
    """What of `wanted` holds of the things that were seen. A thing too many is an error of count, color and shape."""
    colors, shapes = zip(*wanted.objects, strict=True)
    relation = _relation_holds(seen, wanted) if wanted.relation else None
    size = _largest_is(seen, wanted.size) if wanted.size else None
    bound = Counter(thing.combination for thing in seen) == Counter(wanted.objects)
    return Verdict(bound and relation is not False and size is not False, Counter(t.color for t in seen) == Counter(colors),
                   Counter(t.shape for t in seen) == Counter(shapes), len(seen) == len(wanted.objects), relation, size)


def _relation_holds(seen: Sequence[Seen], wanted: Wanted) -> bool:
    """Whether the two things that fit the caption's objects best lie as asked, so that a wrong colour is no wrong relation.

    Best: most of the four colours and shapes right, at least one of each object. Where several pairs fit equally, as when
    two things swapped their colours, it must hold for each of them. A thing lies above another if its centre does by more
    than it lies to a side; so too for the other relations.
    """
    fits: dict[int, list[bool]] = {}
    for pair in itertools.permutations(seen, 2):
        right = [(thing.color == color) + (thing.shape == shape)
                 for thing, (color, shape) in zip(pair, wanted.objects, strict=True)]
        if all(right):
            fits.setdefault(sum(right), []).append(_lies(*pair, wanted.relation))
    return bool(fits) and all(fits[max(fits)])


def _lies(thing: Seen, other: Seen, relation: str) -> bool:
    right, down = _TOWARDS[relation]
    x, y = thing.x - other.x, thing.y - other.y
    return x * right + y * down > abs(x * down) + abs(y * right)


def _largest_is(seen: Sequence[Seen], word: str) -> bool:
    return bool(seen) and (max(thing.size for thing in seen) > LARGE_FROM) == (word == "large")


# ---- accuracy ----

def compositional_accuracy(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, Any]:
    """Shares of pictures, uint8 [S, S, 3] each, that show what their captions say.

    {"all": {"share": 0.5, "captions": 8}, ..., "kinds": {"count": {"all": ...}, ...}}: an entry for each part of a Verdict,
    with the number of captions that ask for it (share None where none does), overall and for each of KINDS. UserError if a
    caption is of none of the forms, if the numbers of pictures and captions differ, or if there are none.
    """
    if len(pictures) != len(captions) or not len(captions):
        raise UserError(f"{len(pictures)} pictures and {len(captions)} captions: must be equally many, and at least one")
    return accuracy([read_scene(pixels) for pixels in pictures], [parse_caption(caption) for caption in captions])


def accuracy(seen: Sequence[Sequence[Seen]], asked: Sequence[Wanted]) -> dict[str, Any]:
    """compositional_accuracy of pictures that were read before."""
    verdicts = [check(things, wanted) for things, wanted in zip(seen, asked, strict=True)]
    kinds = {kind: _shares([v for v, wanted in zip(verdicts, asked, strict=True) if wanted.kind == kind]) for kind in KINDS}
    return {**_shares(verdicts), "kinds": kinds}


def _shares(verdicts: list[Verdict]) -> dict[str, Any]:
    report = {}
    for part in (field.name for field in fields(Verdict)):
        answers = [answer for verdict in verdicts if (answer := getattr(verdict, part)) is not None]
        report[part] = {"share": sum(answers) / len(answers) if answers else None, "captions": len(answers)}
    return report
