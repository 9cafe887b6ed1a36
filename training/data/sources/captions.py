"""Captions as they come, made usable: valid text, one line, bounded length. Knows no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

MAX_CAPTION_CHARS = 2_000  # far above what any text encoder reads; bounds what a hostile caption can cost


class CleanCaption(NamedTuple):
    """A caption that can be used ("" if nothing is left) and what had to be done to it."""

    text: str
    repairs: tuple[str, ...]


def clean_caption(value: object) -> CleanCaption:
    """str, or UTF-8 bytes -> text with single spaces and no NUL, at most MAX_CAPTION_CHARS. Never raises.

    Repairs are named "not text", "not UTF-8", "NUL characters", "too long" and "empty". Cleaning twice changes nothing.
    """
    repairs = []
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("utf-8", errors="replace")
            repairs.append("not UTF-8")
    elif isinstance(value, str):
        text = value.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates cannot be written or tokenized
        if text != value:
            repairs.append("not UTF-8")
    else:
        return CleanCaption("", ("not text",))
    if "\0" in text:
        text = text.replace("\0", "")
        repairs.append("NUL characters")
    text = " ".join(text.removeprefix("\ufeff").split())
    if len(text) > MAX_CAPTION_CHARS:
        text = text[:MAX_CAPTION_CHARS].rstrip()
        repairs.append("too long")
    if not text:
        repairs.append("empty")
    return CleanCaption(text, tuple(repairs))


def clean_captions(value: object, counts: Counter | None = None) -> list[str]:
    """One caption or several (str, bytes, or a list of them; None is none) -> the usable ones, in order.

    Every repair is added to `counts`.
    """
    values: Iterable[object] = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    kept = []
    for one in values:
        text, repairs = clean_caption(one)
        if counts is not None:
            counts.update(repairs)
        if text:
            kept.append(text)
    return kept
