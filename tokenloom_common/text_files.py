"""Text files that people wrote: which encoding their bytes are in, and where their lines end."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from tokenloom_common.errors import MissingFileError, UserError, one_line

SAVE_AS_UTF8 = "save it as UTF-8"

# longest first: UTF-32's little-endian mark begins with that of UTF-16
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MARK = "\ufeff"
# but tab, line ends, form feed, escape and the separators, which texts do hold
_CONTROLS = re.compile("[\0-\b\x0e-\x1a]")
_MOST_CONTROLS = 0.1  # of the characters of a text


class TextDecodeError(ValueError):
    """Bytes that are no text. The message is short and the same for every such file.

    line: the first one that cannot be decoded; None if the text as a whole is no text.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def text_codec(raw: bytes, encoding: str | None = None) -> str:
    """Return the codec of a text: that of its byte order mark, else `encoding`, else UTF-8."""
    for mark, codec in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return codec
    return encoding or "utf-8"


def decode_text(raw: bytes, encoding: str | None = None) -> str:
    """Decode the bytes of a text file: its byte order mark says how, else `encoding`, else UTF-8.

    The result has no byte order mark and the line ends of the file; a few NULs stay. Raises
    TextDecodeError, a ValueError with a short reason, for bytes of another encoding, UTF-16
    without a mark (which may decode as UTF-8 with a NUL beside every letter) and control
    characters that make up a tenth of a text or more.
    """
    codec = text_codec(raw, encoding)
    reason = f"not {codec.upper()}"
    if codec != (encoding or "utf-8"):  # as a byte order mark says
        reason = f"not UTF-8, and damaged {codec.upper()}"
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        readable = raw[:error.start].decode(codec, errors="replace")
        raise TextDecodeError(reason, len(text_lines(readable + "."))) from None
    except (LookupError, UnicodeError) as error:  # no codec of Python, or one that is no encoding
        raise TextDecodeError(f"unknown encoding {codec} ({one_line(error)})") from None

    text = text.lstrip(_MARK)  # programs that put files together leave more than one
    if _CONTROLS.search(text):
        _refuse_controls(text)
    return text


def _refuse_controls(text: str) -> None:
    """Raise TextDecodeError for a text that control characters show to be something else."""
    nuls = text.count("\0")
    if nuls > max(1, len(text) // 2):
        raise TextDecodeError("UTF-32 without a byte order mark" if _nul_runs(text) else "not text")

    # UTF-16 of ASCII letters: a NUL in every pair, always on one side
    most = max(text[0::2].count("\0"), text[1::2].count("\0"))
    is_paired = nuls > 1 and most * 4 >= len(text) and most * 4 >= nuls * 3
    # UTF-16 of others may be ASCII by chance, but for the NUL after each line's end
    line_ends = text.count("\n")
    is_ended = len(text) % 2 == 0 and line_ends > 0 and line_ends == text[0::2].count("\n") and (
        line_ends == text.count("\n\0"))
    if is_paired or is_ended:
        raise TextDecodeError("UTF-16 without a byte order mark")

    controls = len(_CONTROLS.findall(text)) - nuls
    if controls > _MOST_CONTROLS * len(text):
        raise TextDecodeError("not text")


def _nul_runs(text: str) -> bool:
    """Whether NULs stand in threes between single characters, as in UTF-32 of ASCII letters."""
    return len(text) % 4 == 0 and all(
        "\0\0" in text[start:start + 4] for start in range(0, len(text), 4))


def text_lines(text: str) -> list[str]:
    """Split a text at line ends only: \\n and \\r\\n, or \\r where the text has no \\n.

    Unlike str.splitlines, which also splits at form feeds, U+0085, U+2028 and others that stand
    inside of captions. The marks of files put together (`cat a b`) are taken off the lines' starts.
    """
    if "\n" in text:
        lines = text.replace("\r\n", "\n").split("\n")
    else:
        lines = text.split("\r")  # as Macs wrote before 2001
    if lines[-1] == "":
        lines.pop()  # what follows the last line's end is no line
    return [line.lstrip(_MARK) for line in lines]


def read_text_file(path: Path, name: str | None = None, encoding: str | None = None) -> str:
    """Read a text file as decode_text does; UserError naming file and line if it is no text.

    name: the file in messages, such as `--prompts FILE`; its path when None.
    """
    name = name or str(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else one_line(error)
        kind = MissingFileError if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{name}: cannot be read ({reason})") from None
    except ValueError:  # a NUL in the path
        raise UserError(f"{name}: cannot be read (not a file's name)") from None
    try:
        return decode_text(raw, encoding)
    except TextDecodeError as error:
        where = name if error.line is None else f"{name}, line {error.line}"
        raise UserError(f"{where}: {error}; {SAVE_AS_UTF8}") from None
