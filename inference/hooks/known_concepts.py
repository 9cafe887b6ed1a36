"""Prompt expander for models of few concepts: a prompt with a word that the model was never shown
becomes the nearest concept that it was.

By words alone: inflections, the synonyms and the words of the model's concepts.json, spelling,
compounds. A prompt of known words is left as it is.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from inference.hooks.concepts_file import Concepts
from inference.hooks.expansion import Expansion
from inference.hooks.texts import plain_words
from tokenloom_common.errors import UserError

# stop words, then words of a request
_WITHOUT_MEANING_TEXT = """
    a an the my your his her its our their this that these those some any of on in at to for from
    with without by over under near and or but as is are be it i you we they me
    please draw drawing paint painting show make create generate give want picture pictures image
    images photo photograph illustration icon emoji style like very really cute nice"""
_WITHOUT_MEANING = frozenset(_WITHOUT_MEANING_TEXT.split())
# weight of each word relative to the word before it: the thing itself is named first
_POSITION_WEIGHT = 0.85
_KEYWORD_WEIGHT = 0.5  # beside a word of a concept's name
_UNASKED_WEIGHT = 0.35  # taken off for each word of a name that the prompt does not have
_SPELLING = 0.8  # similarity (difflib) to a word of a name that a word is a misspelling of
_SURE_SPELLING = 0.87  # the same to any word of the captions
_LEAST_SPELLED = 4  # letters; shorter words are all alike
_LEAST_COMPOUND = 4  # letters of a compound's last part
_SHOWN = 3  # unknown words that a note names
_SHOWN_CHARACTERS = 60


class KnownConcepts:
    """Expands prompts for a model of `concepts`."""

    def __init__(self, concepts: Concepts) -> None:
        self.concepts = concepts
        self._synonyms = concepts.synonyms or {}
        self._names = [_stems(concept.name) for concept in concepts.concepts]
        self._name_words = {word for concept in concepts.concepts for word in
                            plain_words(concept.name)}
        self._keywords = []
        for concept in concepts.concepts:
            self._keywords.append(_stems(" ".join(concept.keywords)))
        # longest first: "noto blob" is not "noto"
        self._styles = sorted(map(plain_words, concepts.styles), key=len, reverse=True)
        # how many concepts have a word: what few have tells more
        counts: Counter[str] = Counter()
        for name, keywords in zip(self._names, self._keywords, strict=True):
            counts.update(name | keywords)
        most = len(concepts.concepts) + 1
        self._weights = {word: math.log(most / count) for word, count in counts.items()}

    def expand(self, prompt: str) -> Expansion:
        """Return the prompt if the model knows its words; else the nearest concept, and a note."""
        unknown = []
        query = []  # known words, and the nearest ones to unknown words
        for word in _meaningful(prompt):
            if word in self.concepts.words:
                query.append(word)
                continue
            unknown.append(word)
            query += self._nearest_words(word)
        if not unknown:
            return Expansion(prompt)

        drawn = self._nearest_concept(query)
        what = f"{_quoted(unknown)} not among the words that this model was trained on"
        if drawn is None:
            return Expansion(prompt, f"{what}, and nothing near is; drawing it as it stands")
        drawn += self._style(prompt)
        return Expansion(drawn, f"{what}; drawing '{drawn}'")

    def _nearest_words(self, word: str) -> list[str]:
        """Return the known words that stand for an unknown one; none if nothing is near."""
        if not word.isascii() and not word[0].isalnum():  # a symbol, by its name in Unicode
            return [known for known in _symbol_words(word) if known in self.concepts.words]
        for form in _inflections(word):
            if form in self.concepts.words:
                return [form]
        if word in self._synonyms:
            return [self._synonyms[word]]
        return self._respelled(word) or self._last_part(word)

    def _respelled(self, word: str) -> list[str]:
        """Return the known word that a word is most likely a misspelling of."""
        if len(word) < _LEAST_SPELLED:
            return []
        # those of names first: an "elefant" is no "elegant", which is nearer
        for words, cutoff in ((self._name_words, _SPELLING), (self.concepts.words, _SURE_SPELLING)):
            # a wrong first letter is rare, and words that differ in it are other words
            alike = sorted(known for known in words if known[0] == word[0])
            close = difflib.get_close_matches(word, alike, n=1, cutoff=cutoff)
            if close:
                return close
        return []

    def _last_part(self, word: str) -> list[str]:
        """Return the known word that a compound ends in: a snowboat is a boat."""
        for start in range(_LEAST_COMPOUND - 1, len(word) - _LEAST_COMPOUND + 1):
            if word[start:] in self.concepts.words:
                return [word[start:]]
        return []

    def _nearest_concept(self, query: list[str]) -> str | None:
        """Return the name of the concept that the words fit best; None if they fit none."""
        wanted: dict[str, float] = {}
        for place, word in enumerate(query):
            stem = _stem(word)
            weight = _POSITION_WEIGHT ** place * self._weights.get(stem, 0.0)
            wanted[stem] = max(weight, wanted.get(stem, 0.0))

        best, best_score = None, -math.inf
        for number, concept in enumerate(self.concepts.concepts):
            name, keywords = self._names[number], self._keywords[number]
            in_name = sum(wanted[word] for word in name if word in wanted)
            in_keywords = sum(wanted[word] for word in keywords - name if word in wanted)
            if not in_name and not in_keywords:
                continue
            unasked = sum(self._weights[word] for word in name if word not in wanted)
            score = in_name + _KEYWORD_WEIGHT * in_keywords - _UNASKED_WEIGHT * unasked
            if score > best_score:
                best, best_score = concept.name, score
        return best

    def _style(self, prompt: str) -> str:
        """Return the style that a prompt names, as captions name it; "" for none."""
        words = plain_words(prompt)
        for style in self._styles:
            for start in range(len(words) - len(style) + 1):
                if words[start:start + len(style)] == style:
                    return f", {' '.join(style)} style"
        return ""


def model_concepts(model: object) -> Concepts | None:
    """Return what a TextToImage was trained on, where its folder says so."""
    return getattr(getattr(model, "parts", None), "concepts", None)


def concepts_expander(model: object) -> KnownConcepts:
    """Return the expander of a model's own concepts. UserError if it has none."""
    concepts = model_concepts(model)
    if concepts is None:
        raise UserError("--expand known-concepts: the model's folder has no concepts.json, which "
                        "says what it was trained on; make it with `tokenloom data concepts DATA "
                        "--out MODEL/concepts.json`")
    return KnownConcepts(concepts)


def unknown_note(concepts: Concepts, prompt: str) -> str | None:
    """Return a note to the user if a model knows no word of a prompt; None if it knows one."""
    words = _meaningful(prompt)
    if not words or any(word in concepts.words for word in words):
        return None
    return (f"'{_shown(prompt)}': this model was trained on none of its words, so the picture will "
            "have nothing to do with it; --expand known-concepts draws the nearest thing it knows")


# ---- words


def _meaningful(prompt: str) -> list[str]:
    """Return the words and symbols of a prompt that tell what is to be drawn, each once."""
    words: list[str] = []
    for part in prompt.split():
        found = plain_words(part)
        symbols = [sign for sign in part if unicodedata.category(sign) == "So"]
        for word in [*found, *symbols]:
            is_letter = len(word) == 1 and word.isascii() and word.isalpha()  # the s of "dog's"
            if word not in _WITHOUT_MEANING and not is_letter and word not in words:
                words.append(word)
    return words


def _symbol_words(symbol: str) -> list[str]:
    return plain_words(unicodedata.name(symbol, ""))


def _inflections(word: str) -> Iterator[str]:
    """Yield forms that an English word may be known in: singular, plural, stem, not diminutive."""
    yield word + "s"
    if word.endswith("ies"):
        yield word[:-3] + "y"
    for ending in ("s", "es", "ing", "ed", "er", "y", "ie", "ies"):
        if not word.endswith(ending) or len(word) - len(ending) < 3:
            continue
        stem = word[:-len(ending)]
        yield stem
        if ending in ("ing", "ed", "er"):
            yield stem + "e"
        if stem[-1] == stem[-2]:  # doggy, running
            yield stem[:-1]


def _stem(word: str) -> str:
    """Return a word without the s of a plural, which is how words of concepts are compared."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and word[-2] != "s" else word


def _stems(text: str) -> frozenset[str]:
    return frozenset(_stem(word) for word in plain_words(text) if word not in _WITHOUT_MEANING)


def _quoted(words: list[str]) -> str:
    """Return "'a' is", "'a' and 'b' are", at most _SHOWN of them."""
    shown = [f"'{_shown(word)}'" for word in words[:_SHOWN]]
    if len(words) > _SHOWN:
        return f"{', '.join(shown)} and {len(words) - _SHOWN} more are"
    if len(words) == 1:
        return f"{shown[0]} is"
    return f"{', '.join(shown[:-1])} and {shown[-1]} are"


def _shown(text: str) -> str:
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
