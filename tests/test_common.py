"""What every package shares: files that appear whole, errors as one line with their exit code, strict configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from tests import launching
from tokenloom_common import files
from tokenloom_common.config import StrictConfig, dotted_names
from tokenloom_common.errors import (
    DataError,
    MissingFileError,
    ResumeError,
    RunFailedError,
    StoppedBySignalError,
    UserError,
    choose,
    nearest_name,
    one_line,
    run_command,
)
from tokenloom_common.extras import require_extra
from tokenloom_common.files import atomic_folder, write_json_atomic, write_text_atomic


class FullDisk:
    """Stands in for an `os` function: lets `good` calls through, then fails like a full disk."""

    def __init__(self, original, good: int = 0) -> None:
        self.original, self.good = original, good

    def __call__(self, *arguments):
        if self.good == 0:
            self.good = -1  # once
            raise OSError(28, "No space left on device")
        self.good -= 1
        return self.original(*arguments)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "" for p in sorted(folder.rglob("*"))}


# ---- files ----

def test_json_is_written_as_given_and_leaves_nothing_else(tmp_path):
    write_json_atomic(tmp_path / "new" / "a.json", {"é": [1, None]})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"é": [1, None]}
    assert os.listdir(tmp_path / "new") == ["a.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, failing):
    write_json_atomic(tmp_path / "a.json", {"old": 1})
    before = tree(tmp_path)
    monkeypatch.setattr(files.os, failing, FullDisk(getattr(os, failing)))
    with pytest.raises(OSError, match="No space"):
        write_json_atomic(tmp_path / "a.json", {"new": 2})
    assert tree(tmp_path) == before


def test_a_value_that_is_not_json_keeps_the_old_file(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"old": 1})
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "a.json", {"new": object()})
    assert tree(tmp_path) == before


def test_a_text_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda _: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append(f"replace {Path(a).read_text()}"), replace(a, b)))
    write_text_atomic(tmp_path / "a.txt", "whole")
    assert calls == ["fsync", "replace whole", "fsync"]  # the file, its name, the folder's entry


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "model"
    for number in (1, 2):
        with atomic_folder(path, ("*",)) as aside:
            (aside / "sub").mkdir()
            (aside / "sub" / f"{number}.txt").write_text(str(number))
            assert tree(path) == ({} if number == 1 else {"sub": "", "sub/1.txt": "1"})  # not yet
    assert tree(path) == {"sub": "", "sub/2.txt": "2"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_whose_writing_fails_stays_as_it_was(tmp_path, error, exists):
    path = tmp_path / "model"
    if exists:
        path.mkdir()
        (path / "old.txt").write_text("old")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(path, ("*",)) as aside:
        (aside / "half.txt").write_text("half")
        raise error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("good", [0, 1])
def test_a_folder_that_cannot_be_renamed_stays_as_it_was(tmp_path, monkeypatch, good):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    before = tree(tmp_path)
    monkeypatch.setattr(files.os, "rename", FullDisk(os.rename, good))
    with pytest.raises(OSError, match="No space"), atomic_folder(path, ("*",)) as aside:
        (aside / "new.txt").write_text("new")
    assert tree(tmp_path) == before


# ---- errors and exit codes ----

ENDINGS = [
    (UserError("no such thing"), 2, "no such thing"),
    (MissingFileError("a.yaml: no such file"), 2, "a.yaml: no such file"),
    (DataError("holds nothing"), 4, "holds nothing"),
    (ResumeError("damaged"), 3, "damaged"),
    (RunFailedError("the loss is not finite"), 1, "the loss is not finite"),
    (UserError("two\n  lines"), 2, "two lines"),
    (KeyError("width"), 1, "KeyError: 'width'"),
    (ValueError("of a library"), 1, "ValueError: of a library"),
    (MemoryError(), 1, "MemoryError"),
    (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "/a/b: no such file or directory"),
    (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device"),
]


def test_a_stop_by_signal_is_no_error_and_says_how_to_go_on(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_command(ends_with(StoppedBySignalError(15)), [], "prog") == 143
    assert capsys.readouterr().err == "prog: stopped by signal 15 after a checkpoint; the same command goes on from there\n"


def ends_with(error: BaseException):
    def main(_argv) -> int:
        raise error
    return main


@pytest.mark.parametrize(("error", "code", "words"), ENDINGS, ids=[type(case[0]).__name__ + str(case[1]) for case in ENDINGS])
def test_an_error_ends_a_command_in_one_line_and_its_exit_code(capsys, monkeypatch, error, code, words):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    assert run_command(ends_with(error), [], "prog") == code
    shown = capsys.readouterr()
    assert shown.err == f"prog: error: {words}\n"
    assert shown.out == ""


def test_an_interrupt_ends_with_130_in_one_line(capsys):
    assert run_command(ends_with(KeyboardInterrupt()), [], "prog") == 130
    assert capsys.readouterr().err == "prog: interrupted\n"


def test_a_command_gets_its_arguments_and_its_own_code_is_kept(capsys):
    seen = []
    assert run_command(lambda argv: (seen.append(argv), 7)[1], ["a", "b"], "prog") == 7
    assert seen == [["a", "b"]]
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TOKENLOOM_DEBUG", "1")
    with pytest.raises(UserError, match="reason"):
        run_command(ends_with(UserError("reason")), [], "prog")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("ending", ["return 0", "raise SystemExit(0)", "raise ValueError(1)"])
def test_a_reader_that_goes_away_ends_a_command_without_a_traceback(unbuffered, ending):
    code = ("import sys; from tokenloom_common.errors import run_command\n"
            f"def main(argv):\n    sys.stdin.read(); print('x' * 100); {ending}\n"
            "sys.exit(run_command(main, [], 'prog'))")
    with subprocess.Popen([sys.executable, "-c", code], cwd=launching.REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as command:
        command.stdout.close()
        command.stdin.close()
        assert command.wait(30) == 1
        assert command.stderr.read() == ""


def test_errors_stay_what_python_code_expects_to_catch():
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingFileError, FileNotFoundError)
    assert not issubclass(RunFailedError, ValueError)
    assert one_line(MissingFileError("x: no such file")) == "x: no such file"


@pytest.mark.parametrize(("name", "valid", "text"), [
    ("wdith", ["width", "depth"], "; did you mean 'width'?"),
    ("qqqq", ["width", "depth"], "; valid names: depth, width"),
    ("qqqq", ["model", "seed", *(f"model.m{i}" for i in range(30))], "; valid names: model.*, seed"),
    ("qqqq", [], ""),
])
def test_the_nearest_name_or_else_all_names(name, valid, text):
    assert nearest_name(name, valid) == text


def test_a_choice_by_name_lists_the_names():
    assert choose({"vqgan": 1}, "vqgan", "kind") == 1
    with pytest.raises(UserError, match=r"unknown kind 'vqgn'; did you mean 'vqgan'\? \(valid: vqgan, fsq\)"):
        choose({"vqgan": 1, "fsq": 2}, "vqgn", "kind")
    with pytest.raises(UserError) as caught:
        choose({"vqgan": 1, "fsq": 2}, "zzzz", "kind")
    assert str(caught.value) == "unknown kind 'zzzz'; valid names: fsq, vqgan"


# ---- optional dependencies ----

def test_a_missing_package_names_its_purpose_and_the_extra(monkeypatch):
    assert require_extra("json", "a test") is json
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"^a set of emoji needs resvg-py \(.*\): pip install 'tokenloom\[train\]'$"):
        require_extra("resvg_py", "a set of emoji")
    with pytest.raises(UserError, match=r"^log\.wandb needs no-such-module \(.*\): pip install 'tokenloom\[wandb\]'$"):
        require_extra("no_such_module", "log.wandb", "wandb")


# ---- strict configs ----

class Inner(StrictConfig):
    width: int = Field(8, ge=1)
    rate: float = 0.5


class Outer(StrictConfig):
    name: str
    inner: Inner = Inner()


@pytest.mark.parametrize(("values", "message"), [
    ({"name": "a", "inner": {"widht": 3}}, "file: unknown key 'inner.widht'; did you mean 'inner.width'?"),
    ({"nam": "a"}, "file: unknown key 'nam'; did you mean 'name'? (and 1 more)"),
    ({}, "file: missing key 'name'"),
    ({"name": "a", "inner": {"width": 0}}, "file: inner.width: Input should be greater than or equal to 1, got 0"),
    ({"name": "a", "inner": {"rate": float("nan")}}, "file: inner.rate: Input should be a finite number, got nan"),
    ({"name": "a", "inner": {"width": "wide"}},
     "file: inner.width: Input should be a valid integer, unable to parse string as an integer, got 'wide'"),
    ({"name": "a", "inner": {"width": 1.5}}, "inner.width"),
    ({"name": None}, "name"),
])
def test_a_wrong_config_is_one_line_that_names_the_key(values, message):
    with pytest.raises(UserError) as caught:
        Outer.parse(values, "file")
    shown = str(caught.value)
    assert shown == message if message.startswith("file") else message in shown
    assert "\n" not in shown


def test_a_config_cannot_be_changed_and_reads_back():
    config = Outer.parse({"name": "a", "inner": {"width": 3}}, "file")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"
    assert Outer.parse(config.plain(), "file") == config
    assert dotted_names(Outer) == ["name", "inner", "inner.width", "inner.rate"]


def test_a_folder_with_somebodys_files_is_never_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (mine / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"thesis\.txt"), atomic_folder(mine, ("config.json",)):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "file", ("*",)):
        pytest.fail("the block must not run")
    assert (mine / "thesis.txt").read_text() == "years of work"
