"""Prompts files, class names, layouts and configs as editors and other programs write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from inference.checkpoints.formats.llamagen_settings import read_classes
from inference.requests import PromptRequest, prompt_requests, read_prompt_lines
from inference.sampling import SamplingParams
from tests import command_line
from tests.command_line import contents
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from training.engine.deepspeed_json import with_users_file

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")  # the last two write a byte order mark
SIGNS = ("\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1e")


folder = command_line.folder
run = command_line.run


def prompts_of(path: Path) -> list[str]:
    return [request.prompt for request in prompt_requests(path, read_prompt_lines(path), PromptRequest(""), SamplingParams())]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompts_file_is_read_in_every_marked_encoding(tmp_path, encoding, end):
    prompts = ["a red circle", "猫の絵", "ein grüner Kreis"]
    (tmp_path / "p.txt").write_bytes("".join(prompt + end for prompt in prompts).encode(encoding))
    lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + end for prompt in prompts)
    (tmp_path / "p.jsonl").write_bytes(lines.encode(encoding))
    assert prompts_of(tmp_path / "p.txt") == prompts
    assert prompts_of(tmp_path / "p.jsonl") == prompts


@pytest.mark.parametrize("sign", SIGNS)
def test_a_separator_within_a_prompt_ends_no_line(tmp_path, sign):
    prompts = [f"a red{sign}circle", f"a{sign}blue square"]
    (tmp_path / "p.txt").write_bytes(("\n".join(prompts) + "\n").encode())
    (tmp_path / "p.jsonl").write_bytes("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts).encode())
    assert prompts_of(tmp_path / "p.txt") == prompts
    assert prompts_of(tmp_path / "p.jsonl") == prompts


def test_no_prompt_begins_with_a_byte_order_mark_or_holds_a_nul(tmp_path):
    (tmp_path / "joined.txt").write_bytes("\ufeffone\r\n".encode() + "\ufefftwo\0\r\n".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ufeffone"}\n\ufeff{"prompt": "two"}\n', "utf-8")
    assert prompts_of(tmp_path / "joined.txt") == prompts_of(tmp_path / "p.jsonl") == ["one", "two"]


@pytest.mark.parametrize(("name", "encoding"), [("p.txt", "utf-8-sig"), ("p.jsonl", "utf-16"), ("p.txt", "utf-16")])
def test_the_pictures_record_holds_the_prompt_alone(run, folder, tmp_path, name, encoding):
    lines = {"p.txt": "a red\u2028heart\r\n", "p.jsonl": '{"prompt": "a red\u2028heart"}\r\n'}
    (tmp_path / name).write_bytes(lines[name].encode(encoding))
    shown = run("generate", "--prompts", tmp_path / name, "--model", folder, "--out", tmp_path / "out", "--device", "cpu")
    assert shown.code == 0, shown.err
    (path,) = shown.out
    assert json.loads(Image.open(path).info["tokenloom"])["prompt"] == "a red\u2028heart"


@pytest.mark.parametrize(("name", "raw", "words"), [
    ("p.txt", b"a cat\nna\xefve\n", "p.txt, line 2: not UTF-8; save it as UTF-8"),
    ("p.jsonl", '{"prompt": "猫"}'.encode("cp932"), "p.jsonl, line 1: not UTF-8; save it as UTF-8"),
    ("p.txt", "a cat\r\n".encode("utf-16-le"), "p.txt: UTF-16 without a byte order mark; save it as UTF-8"),
    ("p.jsonl", b'{"prompt": "a"}\n'.decode().encode("utf-16-be"), "p.jsonl: UTF-16 without a byte order mark; save"),
    ("p.txt", b"\xef\xbb\xbf\r\n", "holds no prompt"), ("p.txt", b"\0\n", "holds no prompt"),
    ("p.jsonl", b'\n\n{"prompt": "a", "num_images": "2"}\n', "p.jsonl, line 3: num_images must be a whole number"),
    ("p.jsonl", b'{"prompt": "a", "num_images": 0}\n', "p.jsonl, line 1: num_images must be a whole number"),
    ("p.JSONL", b'{"prompt": "a", "seed": "7"}\n', "p.JSONL, line 1: seed must be a whole number of at least 0, got '7'"),
    ("p.jsonl", b'{"prompt": "a", "seed": 1e3}\n', "p.jsonl, line 1: seed must be a whole number"),
    ("p.jsonl", b'{"prompt": "a", "seed": null}\n', "p.jsonl, line 1: seed must be a whole number"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "negative_prompt": 5}\n', "p.jsonl, line 2: a prompt must be text"),
    ("p.ndjson", b'{"prompt": "a"\n', "p.ndjson, line 1: not JSON"),
    ("p.txt", b"a\n\n" + b"b" * 10_001, "p.txt, line 3: a prompt has 10,001 characters"),
    ("p.txt", b'{"prompt": "a", "seed": 7}\n', "p.txt, line 1: is a JSON object; rename the file to end in .jsonl"),
    ("p", b'\xef\xbb\xbf {"seed": 7, "prompt": "a"}\r\n', "p, line 1: is a JSON object"),
    ("p.json", b'[{"prompt": "a"}]', "p.json: .json is not read; give a text file"),
    ("p.CSV", b"prompt,seed\na cat,3\n", "p.CSV: .csv is not read; give a text file"),
    ("p.tsv", b"prompt\tseed\n", "p.tsv: .tsv is not read; give a text file")])
def test_a_prompts_file_that_cannot_be_used_is_named_before_the_model_is_loaded(run, tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    shown = run("generate", "--prompts", tmp_path / name, "--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (shown.code, shown.out, len(shown.err)) == (2, [], 1)
    assert words in shown.err[0]
    assert contents(tmp_path / "out") == {}


def test_an_empty_name_is_no_prompts_file(run, tmp_path):
    shown = run("generate", "--prompts", "", "--model", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (shown.code, shown.err) == (2, ["tokenloom generate: error: --prompts is empty; give a file"])


def test_a_caption_may_hold_braces(tmp_path):
    prompts = ["{a|b} red circle", "{}", '{"a": 1}', "[prompt]"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    assert prompts_of(tmp_path / "p.txt") == prompts


@pytest.mark.parametrize(("line", "words"), [
    ("{'prompt': 'a'}", r"line 2: not JSON \(Expecting property name enclosed in double quotes, column 2\)"),
    ("[" * 100_000, r"line 2: not JSON that can be read"), ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "line 2: ")])
def test_a_line_that_is_no_json_is_named_with_its_column(tmp_path, line, words):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UserError, match=words):
        prompts_of(tmp_path / "p.jsonl")


# ---- the other files that people write


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_class_names_are_read_like_prompts(tmp_path, encoding):
    (tmp_path / "names.txt").write_bytes("tench\x0cfish\r\ngoldfish\u2028\u00e9\r\n".encode(encoding))
    assert read_classes(tmp_path / "names.txt", 2).config.classes == ("tench\x0cfish", "goldfish\u2028\u00e9")


def test_class_names_that_are_no_utf8_are_refused_with_their_line(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"tench\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"--classes .*names\.txt, line 2: not UTF-8; save it as UTF-8"):
        read_classes(tmp_path / "names.txt", 2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_configs_are_read_in_every_marked_encoding(tmp_path, encoding):
    (tmp_path / "a.yaml").write_bytes("path: bücher\r\n".encode(encoding))
    (tmp_path / "a.json").write_bytes('{"path": "bücher"}\r\n'.encode(encoding))
    (tmp_path / "ds.json").write_bytes(b'{"gradient_clipping": "auto"}'.decode().encode(encoding))
    assert read_mapping(tmp_path / "a.yaml") == read_mapping(tmp_path / "a.json") == {"path": "bücher"}
    assert with_users_file({"gradient_clipping": 2.0}, tmp_path / "ds.json") == {"gradient_clipping": 2.0}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_layout_of_numbers_is_read_in_every_marked_encoding(tmp_path, encoding, run):
    (tmp_path / "good.json").write_bytes(b"[[0, 1]]".decode().encode(encoding))
    (tmp_path / "bad.json").write_bytes(b"[[0, 1]\r\n".decode().encode(encoding))
    for name, words in (("good", "no such model folder"), ("bad", "not JSON: Expecting ',' delimiter, line 2")):
        shown = run("generate", "x", "--layout", tmp_path / f"{name}.json", "--model", tmp_path / "nowhere", "--out", tmp_path)
        assert shown.code == 2
        assert words in shown.err[0]
