"""Text files: a byte order mark decides the encoding, and only line ends end a line."""

import codecs

import pytest

from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.text_files import TextDecodeError, decode_text, read_text_file, text_lines

TEXTS = ("a red circle\nein gr\xfcner Kreis\n", "\u732b\u306e\u7d75\r\n", "", "x", "\U0001f534 \u2028 e\u0301")
MARKS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE,
         "utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.mark.parametrize("codec", MARKS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_byte_order_mark_decides_the_encoding_and_goes(codec: str, text: str) -> None:
    raw = MARKS[codec] + text.encode(codec)
    assert decode_text(raw) == text
    assert decode_text(raw, encoding="cp1252") == text  # a mark is more certain than an option


@pytest.mark.parametrize("text", TEXTS)
def test_without_a_mark_text_is_utf8_or_what_the_caller_says(text: str) -> None:
    assert decode_text(text.encode()) == text
    assert decode_text(text.encode("utf-16-le"), encoding="utf-16-le") == text


@pytest.mark.parametrize(("raw", "encoding", "text"), [
    ("猫".encode("cp932"), "cp932", "猫"), (b"na\xefve", "latin-1", "naïve"), ("тест".encode("koi8-r"), "koi8-r", "тест"),
    (codecs.BOM_UTF8 * 2 + b"a", None, "a"), (("\ufeff" + "猫").encode("gb18030"), "gb18030", "猫")])
def test_other_encodings_and_more_than_one_mark(raw: bytes, encoding: str | None, text: str) -> None:
    assert decode_text(raw, encoding) == text


@pytest.mark.parametrize(("raw", "reason", "line"), [
    (b"a\nb\nna\xefve\n", "not UTF-8", 3), ("猫".encode("cp932"), "not UTF-8", 1), (b"a\r\n\xe7\x8c", "not UTF-8", 2),
    (b"\xed\xa0\x80", "not UTF-8", 1),  # half of a surrogate pair
    (codecs.BOM_UTF16_LE + b"a\0\n\0b", "not UTF-8, and damaged UTF-16", 2)])
def test_bytes_of_another_encoding_are_refused_with_their_line(raw: bytes, reason: str, line: int) -> None:
    with pytest.raises(TextDecodeError) as caught:
        decode_text(raw)
    assert (str(caught.value), caught.value.line) == (reason, line)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["a red circle\r\na blue square\r\n", "a cat", "hi", "ok\n", '{"prompt": "7"}\n', "a\n\n\nb",
                                  "ab \u4e2d c"])
def test_utf16_without_a_mark_is_never_read_as_text_with_nuls(codec: str, text: str) -> None:
    with pytest.raises(TextDecodeError, match=r"^UTF-16 without a byte order mark$"):
        decode_text(text.encode(codec))


@pytest.mark.parametrize(("text", "codec"), [
    ("猫\n", "utf-16-le"),  # two bytes that are ASCII letters by chance
    ("Кот\n", "utf-16-le"), ("Кот", "utf-16-be"), ("κατ", "utf-16-le"), ("שלום", "utf-16-le"), ("का", "utf-16-be")])
def test_utf16_of_other_scripts_that_decodes_by_chance_is_refused(text: str, codec: str) -> None:
    with pytest.raises(TextDecodeError, match=r"UTF-16 without|not text|not UTF-8"):
        decode_text(text.encode(codec))


@pytest.mark.parametrize("codec", ["utf-32-le", "utf-32-be"])
def test_utf32_without_a_mark_is_refused(codec: str) -> None:
    with pytest.raises(TextDecodeError, match=r"^UTF-32 without a byte order mark$"):
        decode_text("a cat\n".encode(codec))


@pytest.mark.parametrize("raw", [b"\1\2\3", b"\0\0\0\0\0", b"ab\x01\x02cd", b"\x05"])
def test_control_characters_in_short_text_are_not_text(raw: bytes) -> None:
    with pytest.raises(TextDecodeError, match=r"^not text$"):
        decode_text(raw)


@pytest.mark.parametrize("text", [
    "a cat\0", "a\0b", "\0a cat", "cats\0\nblue dog\0\n", "a\tb\tc\td", "\x1b[31mred\x1b[0m", "one\x0ctwo\x0bthree",
    "a\x1cb\x1db\x1eb\x1f", "a long caption with one backspace\b in it", "\n\n\n", "a\r\n\r\nb", "   "])
def test_few_controls_nuls_and_separators_stay(text: str) -> None:
    assert decode_text(text.encode()) == text


@pytest.mark.parametrize("codec", ["no-such-codec", "hex", "undefined"])
def test_an_encoding_that_python_does_not_know_is_named(codec: str) -> None:
    with pytest.raises(TextDecodeError, match=f"^unknown encoding {codec} "):
        decode_text(b"a", codec)


@pytest.mark.parametrize(("text", "lines"), [
    ("a\nb\n", ["a", "b"]), ("a\r\nb\r\n", ["a", "b"]), ("a\rb\r", ["a", "b"]), ("a\rb\nc", ["a\rb", "c"]),
    ("a\n\nb", ["a", "", "b"]), ("", []), ("\n", [""]), ("a", ["a"]), ("a\r\n\nb", ["a", "", "b"]),
    ("a\n\ufeffb\n", ["a", "b"])])
def test_lines_end_at_line_ends(text: str, lines: list[str]) -> None:
    assert text_lines(text) == lines


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_no_other_separator_ends_a_line(sign: str) -> None:
    assert text_lines(f"a red{sign}circle\nb{sign}") == [f"a red{sign}circle", f"b{sign}"]


def test_a_file_that_is_no_text_is_named_with_its_line_and_what_to_do(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nna\xefve\n")
    with pytest.raises(UserError, match=r"^--prompts x, line 2: not UTF-8; save it as UTF-8$"):
        read_text_file(path, "--prompts x")
    path.write_bytes("ein".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"a\.txt: UTF-16 without a byte order mark; save it as UTF-8$"):
        read_text_file(path)
    with pytest.raises(MissingFileError, match=r"b\.txt: cannot be read \(no such file or directory\)$"):
        read_text_file(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"cannot be read \(is a directory\)$"):
        read_text_file(tmp_path)
