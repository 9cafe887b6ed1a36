"""concepts.json of a model folder: which concepts, styles and words a model was trained on.

    {"format": 1,
     "concepts": [{"name": "octopus", "keywords": ["animal", "sea"]}, ...],
     "styles": ["noto", ...],
     "words": ["a", "animal", "octopus", ...],
     "synonyms": {"squid": "octopus", ...}}

words: every word of the training captions, as `plain_words` splits them. synonyms: other words of
the language, each with the nearest one of `words`. Optional; `tokenloom data concepts` writes it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.hooks.texts import plain_words
from tokenloom_common.errors import UserError
from tokenloom_common.files import write_text_atomic
from tokenloom_common.text_files import read_text_file

CONCEPTS_NAME = "concepts.json"
FORMAT = 1
MAX_BYTES = 16_000_000
MAX_CONCEPTS = 20_000  # the nearest one is looked for among all of them at each prompt
MAX_WORDS = 200_000  # of words, and of synonyms
MAX_TEXT = 200  # characters of a name, a keyword or a word
FIELDS = ("format", "concepts", "styles", "words", "synonyms")
CONCEPT_FIELDS = ("name", "keywords")


@dataclass(frozen=True)
class Concept:
    """A thing that a model was trained to draw, by the caption that names it."""

    name: str
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concepts:
    """The contents of a concepts.json."""

    concepts: tuple[Concept, ...]
    words: frozenset[str]
    styles: tuple[str, ...] = ()
    synonyms: dict[str, str] | None = None  # None: nothing is known of other words

    @classmethod
    def parse(cls, values: Any, where: str) -> Concepts:
        """Check the values of a concepts.json. UserError naming `where` and the wrong field."""
        fields = _fields(values, FIELDS, where)
        if fields.get("format") != FORMAT:
            raise UserError(f"{where}: format {fields.get('format')!r} is not read by this "
                            f"release, which reads {FORMAT}; build it again with `tokenloom data "
                            "concepts`")
        entries = _list(fields.get("concepts"), MAX_CONCEPTS, f"{where}: concepts")
        if not entries:
            raise UserError(f"{where}: concepts is empty")
        concepts = []
        for number, entry in enumerate(entries):
            place = f"{where}: concepts[{number}]"
            own = _fields(entry, CONCEPT_FIELDS, place)
            name = _text(own.get("name"), f"{place}.name")
            keywords = _texts(own.get("keywords", []), MAX_CONCEPTS, f"{place}.keywords")
            concepts.append(Concept(name, tuple(keywords)))

        words = frozenset(_texts(fields.get("words"), MAX_WORDS, f"{where}: words"))
        styles = _texts(fields.get("styles", []), MAX_CONCEPTS, f"{where}: styles")
        synonyms = fields.get("synonyms")
        if synonyms is not None:
            _check_synonyms(synonyms, words, f"{where}: synonyms")
        return cls(tuple(concepts), words, tuple(styles), synonyms)

    def write(self, path: Path) -> None:
        """Write the file, atomically, one concept a line."""
        def compact(value: object) -> str:
            return json.dumps(value, ensure_ascii=False)

        lines = []
        for concept in self.concepts:
            lines.append(compact({"name": concept.name, "keywords": list(concept.keywords)}))
        text = (f'{{"format": {FORMAT},\n"concepts": [\n' + ",\n".join(lines)
                + f'\n],\n"styles": {compact(list(self.styles))},\n'
                f'"words": {compact(sorted(self.words))}')
        if self.synonyms is not None:
            text += f',\n"synonyms": {compact(self.synonyms)}'
        write_text_atomic(path, text + "}\n")


def read_concepts(path: Path) -> Concepts:
    """Read a concepts.json. UserError naming the file for one that cannot be read or is wrong."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES // 10**6} MB")
    text = read_text_file(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists
        what = getattr(error, "msg", type(error).__name__)
        raise UserError(f"{path}: not JSON ({what}); build it again with `tokenloom data "
                        "concepts`") from None
    return Concepts.parse(values, str(path))


def folder_concepts(folder: Path) -> Concepts | None:
    """Read the concepts.json of a model folder; None where it has none."""
    path = folder / CONCEPTS_NAME
    return read_concepts(path) if path.exists() else None


def _fields(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    unknown = [name for name in value if name not in names]
    if unknown:
        raise UserError(f"{where}: unknown field '{unknown[0][:MAX_TEXT]}'; valid: "
                        f"{', '.join(names)}")
    return value


def _list(value: Any, most: int, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {type(value).__name__}")
    if len(value) > most:
        raise UserError(f"{where}: {len(value):,} entries, at most {most:,} are read")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise UserError(f"{where}: expected text of 1 to {MAX_TEXT} characters, got "
                        f"{str(value)[:40]!r}")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", value):  # names are printed on terminals
        raise UserError(f"{where}: {value[:40]!r} holds a control character")
    return value


def _texts(value: Any, most: int, where: str) -> list[str]:
    found = []
    for number, one in enumerate(_list(value, most, where)):
        found.append(_text(one, f"{where}[{number}]"))
    return found


def _check_synonyms(value: Any, words: frozenset[str], where: str) -> None:
    if not isinstance(value, dict) or len(value) > MAX_WORDS:
        raise UserError(f"{where}: expected an object of at most {MAX_WORDS:,} words")
    for word, known in value.items():
        _text(word, where)
        if _text(known, f"{where}['{word}']") not in words:
            raise UserError(f"{where}['{word}']: '{known}' is not one of words")


def caption_words(captions: list[str]) -> frozenset[str]:
    """Return all words of captions."""
    return frozenset(word for caption in captions for word in plain_words(caption))
