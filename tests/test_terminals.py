"""Terminals: what stdout and stderr cannot show never ends a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import launching, tiny

PROMPTS = ("猫 heart", "a red circle", "na\u00efve \U0001f534", "\ud83d lone")
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TERMINALS = {"latin-1": {"PYTHONIOENCODING": "latin-1"}, "ascii": {"PYTHONIOENCODING": "ascii"},
             "cp932": {"PYTHONIOENCODING": "cp932"}, "utf-8": {"PYTHONIOENCODING": "utf-8"}, "C": ASCII_LOCALE}


def python(arguments: list[object], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=launching.REPOSITORY, capture_output=True, check=False,
                          env={**launching.environment(), **environment}, timeout=120)


def prints(text: str, environment: dict[str, str], stream: str = "stdout") -> subprocess.CompletedProcess[bytes]:
    code = ("import logging, sys; from tokenloom_common.errors import run_command\n"
            f"def main(argv):\n    text = {text!a}\n"
            f"    print(text, file=sys.{stream})\n    print('after'); return 0\n"
            "sys.exit(run_command(main, [], 'prog'))")
    return python(["-c", code], **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.long
@pytest.mark.parametrize("terminal", ["cp932", "C"])
def test_every_prompt_of_a_file_is_drawn_whatever_the_terminal_shows(folder, tmp_path, terminal):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = python(["-m", "tokenloom", "generate", "--prompts", tmp_path / "p.jsonl", "--model", folder, "--out",
                   tmp_path / "out", "--device", "cpu"], **TERMINALS[terminal])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(PROMPTS)
    told = {json.loads(Image.open(path).info["tokenloom"])["prompt"] for path in (tmp_path / "out").glob("*.png")}
    assert told == set(PROMPTS)


@pytest.mark.parametrize(("terminal", "shown"), [
    ("latin-1", b"\\u732b \xfc \\U0001f534"), ("ascii", b"\\u732b \\xfc \\U0001f534"), ("C", b"\\u732b \\xfc \\U0001f534"),
    ("cp932", b"\x94L \\xfc \\U0001f534"), ("utf-8", "猫 ü \U0001f534".encode())])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_characters_that_a_terminal_lacks_are_escaped_and_the_others_stay(terminal, shown, stream):
    done = prints("猫 ü \U0001f534", TERMINALS[terminal], stream)
    assert done.returncode == 0, done.stderr
    assert getattr(done, stream).splitlines()[0] == shown
    assert done.stdout.splitlines()[-1] == b"after"


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_files_name_of_any_bytes_is_written_as_its_bytes(terminal):
    done = prints("x\udcff\udce7y", TERMINALS[terminal])
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, b"x\xff\xe7y")


def test_half_a_surrogate_pair_is_escaped_in_utf8():
    assert prints("\ud83d", TERMINALS["utf-8"]).stdout.splitlines()[0] == b"\\ud83d"


@pytest.mark.parametrize("ending", ["> /dev/null", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_no_command(ending):
    command = f"'{sys.executable}' -m tokenloom --help {ending}"
    done = subprocess.run(command, shell=True, cwd=launching.REPOSITORY, env=launching.environment(), timeout=60, check=False,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.long
def test_captions_of_the_command_line_are_utf8_whatever_the_locale_says(folder, tmp_path):
    command = [sys.executable, "-m", "tokenloom", "generate", "a 猫", "--negative-prompt", "ü", "--model", str(folder), "--out",
               str(tmp_path / "größe"), "--device", "cpu"]
    done = subprocess.run([os.fsencode(part) for part in command], cwd=launching.REPOSITORY, capture_output=True, check=False,
                          env={**launching.environment(), **ASCII_LOCALE}, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    assert Path(os.fsdecode(path)).parent == tmp_path / "größe"  # the bytes of the name, which scripts can use
    told = json.loads(Image.open(path.decode()).info["tokenloom"])
    assert (told["prompt"], told["negative_prompt"]) == ("a 猫", "ü")


@pytest.mark.long
def test_the_other_commands_show_names_in_every_terminal(tmp_path):
    data = tmp_path / "猫の絵"
    data.mkdir()
    Image.new("RGB", (32, 32), "red").save(data / "ü.png")
    (data / "ü.txt").write_text("赤", "utf-8")
    (data / "х.png").write_bytes(b"broken")
    (data / "х.txt").write_text("赤", "utf-8")
    reconstruct = ["reconstruct", data / "х.png", "--model", data, "--out", data / "o"]
    for argv, code in ((["data", "check", data], 0), (["runs", data], 2), (["info", data], 2), (["report", data], 2),
                       (reconstruct, 2)):
        done = python(["-m", "tokenloom", *argv], **TERMINALS["ascii"])
        assert done.returncode == code, (argv, done)
        assert b"UnicodeEncodeError" not in done.stderr + done.stdout
        assert b"Traceback" not in done.stderr


@pytest.mark.long
def test_a_training_script_names_files_in_every_terminal():
    done = python(["training/encode_dataset.py", "--config", "größe.yaml"], **TERMINALS["cp932"])
    assert done.returncode == 2, done.stderr
    assert b"gr\\xf6\\xdfe" in done.stderr
    assert b"Traceback" not in done.stderr
