"""Safety filter of words: a prompt that holds one of a list is refused.

It looks at words alone, so it is no protection against somebody who wants past it: a synonym,
another language or a typing error suffices. It looks at no image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference.hooks.texts import plain_words, split_words, without_marks
from tokenloom_common.errors import UserError
from tokenloom_common.text_files import read_text_file, text_lines

if TYPE_CHECKING:
    from PIL import Image

HARMFUL_WORDS = (
    # sexual content
    "porn", "porno", "pornographic", "pornography", "nsfw", "xxx", "hentai", "nude", "nudity",
    "naked", "topless", "genitals", "penis", "vagina", "orgasm", "masturbating", "masturbation",
    "blowjob", "erotic", "erotica", "sex act", "sex scene", "having sex", "fetish", "bdsm",
    # children
    "child porn", "csam", "loli", "lolicon", "shota", "shotacon", "jailbait", "pedophile",
    "paedophile", "pedophilia", "paedophilia", "underage girl", "underage boy",
    # violence
    "rape", "raping", "rapist", "molest", "molesting", "incest", "bestiality", "necrophilia",
    "gore", "gory", "beheading", "beheaded", "decapitated", "decapitation", "dismembered",
    "mutilated", "disemboweled", "torture", "tortured", "snuff film", "mass shooting",
    "school shooting", "lynching", "genocide", "execution video",
    # self-harm
    "suicide", "self harm", "selfharm", "cutting wrists", "slit wrists", "hang myself",
    # terror, hate and its signs
    "terrorist attack", "suicide bomber", "isis flag", "swastika", "nazi", "hitler", "heil",
    "ku klux klan", "kkk", "white power", "ethnic cleansing",
)
"""The built-in list, in English: words and phrases that clearly ask for harmful images.

Slurs are not in it: which ones matter depends on where a model is offered (--safety-words).
"""

MAX_FILE_BYTES = 10_000_000  # of --safety-words
# digits and signs written for letters, in words that are meant to pass a list
_LEET = str.maketrans("013457@$!|", "oieastasii")
_SPELLED_LETTERS = 3  # at least so many single letters in a row are read as one word
_SHOWN_CHARACTERS = 40


class WordList:
    """Refuses a prompt that holds one of `words`: whole words, and phrases of them.

    Case, diacritics and characters without width are looked past, a plural's s, digits that stand
    for letters (p0rn), and single letters in a row (p o r n).
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.phrases = {" ".join(plain_words(word)) for word in words} - {""}
        self.longest = max((phrase.count(" ") + 1 for phrase in self.phrases), default=0)

    def check_prompt(self, prompt: str) -> str | None:
        """Return which word of the list a prompt holds; None if it holds none."""
        for reading in _readings(prompt):
            for phrase in _phrases(reading, self.longest):
                for form in (phrase, phrase.removesuffix("s")):
                    if form in self.phrases:
                        return f"'{form[:_SHOWN_CHARACTERS]}' is on the word list"
        return None

    def check_images(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Refuse no image: this filter reads prompts alone."""
        return [None] * len(images)


def load_word_list(path: str | None = None) -> WordList:
    """Return the filter of HARMFUL_WORDS and of those in a text file, one word or phrase a line.

    Blank lines and lines that begin with # are left out. UserError naming file and line for what
    cannot be read or holds no word.
    """
    if path is None:
        return WordList(HARMFUL_WORDS)
    name = f"--safety-words {path}"
    file = Path(path)
    if not path or file.is_dir():  # Path("") is the working directory
        raise UserError(f"{name}: give a text file with one word or phrase per line")
    if file.is_file() and file.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{name}: larger than {MAX_FILE_BYTES // 10**6} MB, which no word list is")

    own = []
    for number, line in enumerate(text_lines(read_text_file(file, name)), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not plain_words(text):
            raise UserError(f"{name}, line {number}: {text[:_SHOWN_CHARACTERS]!r} holds no letter "
                            "or digit, so no word can match it")
        own.append(text)
    if not own:
        raise UserError(f"{name}: holds no word")
    return WordList((*HARMFUL_WORDS, *own))


def _readings(text: str) -> Iterator[list[str]]:
    """Yield the words of a prompt as they stand, spelled letters as one, and with leet undone."""
    words = plain_words(text)
    yield words
    yield from _joined(words)

    undone = []
    for chunk in without_marks(text).split():
        # numbers stay numbers: 1945 is no word
        has_letter = any(letter.isalpha() for letter in chunk)
        undone.append(chunk.translate(_LEET) if has_letter else chunk)
    yield from _joined(split_words(" ".join(undone)))


def _joined(words: list[str]) -> Iterator[list[str]]:
    """Yield words with _SPELLED_LETTERS or more single letters in a row as one word, in two ways.

    A first letter a or i is the word's own ("i n c e s t"), or a word before it ("a p o r n star").
    """
    for is_own in (True, False):
        yield list(_with_spelled(words, is_own))


def _with_spelled(words: list[str], is_own: bool) -> Iterator[str]:
    letters = ""
    for word in [*words, ""]:  # "" ends the last row
        if len(word) == 1:
            letters += word
            continue
        if not is_own and len(letters) > _SPELLED_LETTERS and letters[0] in "ai":
            yield letters[0]
            letters = letters[1:]
        if len(letters) >= _SPELLED_LETTERS:
            yield letters
        else:
            yield from letters
        letters = ""
        if word:
            yield word


def _phrases(words: list[str], longest: int) -> Iterator[str]:
    """Yield all runs of one to `longest` words."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + longest, len(words)) + 1):
            yield " ".join(words[start:end])
