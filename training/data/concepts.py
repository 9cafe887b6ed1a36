"""Build a model's concepts.json from the captioned data that it was trained on.

See `inference.hooks.concepts_file` for the format, `inference.hooks.known_concepts` for its use.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from inference.hooks.concepts_file import MAX_CONCEPTS, MAX_TEXT, Concept, Concepts, caption_words
from inference.hooks.texts import plain_words
from seq2seq import FrozenTextEncoder
from tokenloom_common.errors import DataError, UserError
from tokenloom_common.progress import progress
from training.data.sources.open_dataset import open_dataset

STYLE_COLUMN = "style"
TEMPLATE_SHARE = 0.15  # a phrase of more of the concepts tells nothing of any: "in the noto style"
LEAST_TEMPLATE = 3  # concepts; in a set of five every phrase would be a template
SYNONYM_SIMILARITY = 0.6  # cosine; below it MiniLM's neighbours are mostly not alike
NAME_BONUS = 0.06  # a concept's name is drawn better than one of its keywords
ENCODED_AT_ONCE = 256
LEAST_LETTERS = 3
WORD_LENGTH = 8  # text ids of a word, more than any has
_PHRASE_ENDS = re.compile(r"[,;:()]")


def build_concepts(path: str | Path, split: str | None = None, text_encoder: str | None = None,
                   other_words: Iterable[str] = (), **reading: Any) -> Concepts:
    """Collect concepts, keywords, styles and words of a captioned data set.

    A concept is the first caption of its rows; keywords are the phrases of all their captions that
    neither hold its name nor belong to very many concepts. text_encoder: folder or hub id of a
    sentence encoder with a WordPiece vocabulary; finds synonyms for the words of that vocabulary
    and for `other_words`.
    reading: as for open_dataset. DataError if nothing is usable, or all captions are too long.
    """
    encoder = None
    if text_encoder is not None:  # first: the data takes longer
        encoder = FrozenTextEncoder.load(text_encoder, WORD_LENGTH)
    data = open_dataset(path, split=split, **reading)
    captions_of: dict[str, list[str]] = defaultdict(list)
    styles: Counter[str] = Counter()
    for row in progress(range(len(data)), "captions", unit="row"):
        captions = data.captions(row)
        if captions:
            captions_of[captions[0]] += captions
        style = data.metadata(row).get(STYLE_COLUMN) if STYLE_COLUMN in data.columns else None
        if isinstance(style, str) and style.strip():
            styles[style] += 1

    words = set().union(*(caption_words(captions) for captions in captions_of.values()))
    concepts = _concepts(captions_of)
    if not concepts:
        raise DataError(f"{path}: no caption is short enough to name a concept (at most {MAX_TEXT} "
                        "characters)")
    synonyms = None
    if encoder is not None:
        names = caption_words([concept.name for concept in concepts])
        others = _vocabulary(encoder) | _english(other_words)
        synonyms = find_synonyms(encoder, others - words, words, names)
    return Concepts(tuple(concepts), frozenset(words), tuple(sorted(styles)), synonyms)


def _concepts(captions_of: dict[str, list[str]]) -> list[Concept]:
    """Return the concepts with their keywords; of more than MAX_CONCEPTS the most frequent."""
    names = [name for name in captions_of if len(name) <= MAX_TEXT]
    names.sort(key=lambda name: -len(captions_of[name]))  # stable: else in the order of the data
    names = names[:MAX_CONCEPTS]
    phrases_of = {name: _phrases(name, captions_of[name]) for name in names}
    counts = Counter(phrase for phrases in phrases_of.values() for phrase in phrases)
    most = max(LEAST_TEMPLATE, TEMPLATE_SHARE * len(names))
    concepts = []
    for name in names:
        keywords = [phrase for phrase in phrases_of[name] if counts[phrase] <= most]
        concepts.append(Concept(name, tuple(keywords)))
    return concepts


def _phrases(name: str, captions: Iterable[str]) -> list[str]:
    """Return the phrases of a concept's captions that do not hold its name, each once."""
    name_words = plain_words(name)
    found: dict[str, None] = {}
    for caption in captions:
        for phrase in _PHRASE_ENDS.split(caption):
            words = plain_words(phrase)
            if words and len(phrase) <= MAX_TEXT and not _holds(words, name_words):
                found[" ".join(words)] = None
    return list(found)


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    """Whether the words of `part` stand in `words`, one after another."""
    starts = range(len(words) - len(part) + 1)
    return any(list(words[start:start + len(part)]) == list(part) for start in starts)


# ---- synonyms


def find_synonyms(encoder: FrozenTextEncoder, others: Iterable[str], words: Iterable[str],
                  names: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return those of `others` that one of `words` is near to, each with the nearest.

    names: words that are preferred by NAME_BONUS.
    """
    known = sorted(_english(words))
    searched = sorted(others)
    if not known or not searched:
        return {}
    known_directions = _directions(encoder, known)  # [known, F]
    bonus = torch.tensor([NAME_BONUS if word in names else 0.0 for word in known])

    found = {}
    for start in progress(range(0, len(searched), ENCODED_AT_ONCE), "synonyms", unit="batch"):
        part = searched[start:start + ENCODED_AT_ONCE]
        similarity = _directions(encoder, part) @ known_directions.T + bonus  # [part, known]
        best = similarity.max(dim=1)
        for word, value, index in zip(part, best.values.tolist(), best.indices.tolist(),
                                      strict=True):
            if value >= SYNONYM_SIMILARITY:
                found[word] = known[index]
    return found


def _english(words: Iterable[str]) -> set[str]:
    """Return the words in lower case that are no names, numbers or abbreviations."""
    return {word for word in words if word.isascii() and word.isalpha() and word.islower()
            and len(word) >= LEAST_LETTERS}


def _vocabulary(encoder: FrozenTextEncoder) -> set[str]:
    """Return the whole words of an encoder's WordPiece vocabulary. UserError for another kind."""
    pieces = encoder.vocabulary()
    if not any(piece.startswith("##") for piece in pieces):
        raise UserError(f"--text-encoder {encoder.config.name}: its vocabulary does not tell words "
                        "from parts of words; give an encoder of BERT's kind, such as MiniLM")
    return _english(pieces)


def _directions(encoder: FrozenTextEncoder, texts: Sequence[str]) -> torch.Tensor:
    """Return the mean features of texts, of length 1: [texts, F]."""
    parts = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        batch = encoder.encode(texts[start:start + ENCODED_AT_ONCE])
        real = batch.text_mask[..., None].to(batch.text_input.dtype)  # [B, T, 1]
        mean = (batch.text_input * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        parts.append(torch.nn.functional.normalize(mean, dim=1))
    return torch.cat(parts)
