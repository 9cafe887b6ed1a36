"""Words of texts, as the word list and the known concepts compare them."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")


def without_marks(text: str) -> str:
    """Return a text in lower case, without diacritics and characters without width."""
    decomposed = unicodedata.normalize("NFKD", text)
    kept = [letter for letter in decomposed if unicodedata.category(letter) not in ("Mn", "Cf")]
    return "".join(kept).casefold()


def plain_words(text: str) -> list[str]:
    """Split a text into its words of letters and digits, each `without_marks`."""
    return _WORD.findall(without_marks(text))


def split_words(text: str) -> list[str]:
    """Split a text that `without_marks` has been applied to."""
    return _WORD.findall(text)
