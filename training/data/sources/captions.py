"""Clean captions: valid text, on one line, of bounded length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tokenloom_common.text_files import text_lines

NOT_UTF8 = "not UTF-8"
MAX_CAPTION_CHARS = 2_000  # more than any text encoder reads; bounds the cost of a hostile caption


class CleanCaption(NamedTuple):
    """A usable caption ("" if nothing is left) and the repairs that it needed."""

    text: str
    repairs: tuple[str, ...]


def clean_caption(value: object) -> CleanCaption:
    """str, or UTF-8 bytes -> text with single spaces, without NUL, at most MAX_CAPTION_CHARS.

    Repairs are named "not text", "not UTF-8", "NUL characters", "too long" and "empty". Nothing is
    left of bytes that are not UTF-8: what they say in another encoding cannot be known. Cleaning
    twice changes nothing. Never raises.
    """
    repairs = []
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            return CleanCaption("", (NOT_UTF8,))
    elif isinstance(value, str):
        # lone surrogates can be neither written nor tokenized
        text = value.encode("utf-8", errors="replace").decode("utf-8")
        if text != value:
            repairs.append(NOT_UTF8)
    else:
        return CleanCaption("", ("not text",))

    if "\0" in text:
        text = text.replace("\0", "")
        repairs.append("NUL characters")
    # a byte order mark, which Windows editors put before the text of a .txt file
    text = " ".join(text.removeprefix("\ufeff").split())
    if len(text) > MAX_CAPTION_CHARS:
        text = text[:MAX_CAPTION_CHARS].rstrip()  # a cut at a space would be cleaned once more
        repairs.append("too long")
    if not text:
        repairs.append("empty")
    return CleanCaption(text, tuple(repairs))


def caption_lines(text: str) -> list[str]:
    """Return the lines of a caption file that hold a caption each."""
    return [line for line in text_lines(text) if line.strip()]


def clean_captions(value: object, counts: Counter | None = None) -> list[str]:
    """Return the usable captions, in order. Every repair is added to `counts`.

    value: one caption or a list of them, str or bytes; None is no caption.
    """
    values: Iterable[object]
    if isinstance(value, (list, tuple)):
        values = value
    elif value is None:
        values = []
    else:
        values = [value]

    usable = []
    for caption in values:
        text, repairs = clean_caption(caption)
        if counts is not None:
            counts.update(repairs)
        if text:
            usable.append(text)
    return usable


def unusable_reason(captions: object) -> str:
    """Return why an item is dropped of whose captions `clean_captions` leaves nothing."""
    repairs: Counter = Counter()
    clean_captions(captions, repairs)
    return f"caption {NOT_UTF8}" if repairs[NOT_UTF8] else "no caption"


def caption_values(column: Any, names: Sequence[str] | None = None) -> list[Any]:
    """Convert an Arrow column of captions to Python values, text as bytes, classes as text.

    Bytes because Arrow does not promise that its text is valid UTF-8.
    """
    import pyarrow as pa

    def is_text(kind: Any) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    if pa.types.is_dictionary(column.type):  # as pandas writes categories
        column = column.cast(column.type.value_type)
    kind = column.type
    # to the large types (64-bit offsets), which both widths can be cast to
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_text(kind):
        column = column.cast(pa.large_binary())
    elif is_list and is_text(kind.value_type):
        column = column.cast(pa.large_list(pa.large_binary()))
    return [class_names(value, names) for value in column.to_pylist()]


def class_names(value: Any, names: Sequence[str] | None = None) -> Any:
    """Replace the numbers of classes by their names, or by their digits if they have none."""
    if isinstance(value, list):
        return [class_names(one, names) for one in value]
    if isinstance(value, float) and value.is_integer():  # as pandas writes what has gaps
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):  # True is an int, and no class
        return value
    if names is None:
        return str(value)
    return names[value] if 0 <= value < len(names) else None  # -1 is the hub's sign for no class
