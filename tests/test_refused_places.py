"""Every command and script refuses a place that it cannot write to, before it opens anything else: one line, exit code 2."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as benchmarks
import tokenloom
from tests import launching
from training.commands import data, evaluate
from training.places import SCRIPTS

ROOT = Path(__file__).parents[1]
# none of these inputs exists: a command that opened one before it looks at the place would complain about that one
MODEL, DATA = "/nowhere/model", "/nowhere/data"

FOLDERS = {
    "tokenloom generate": ("--out", ["a red heart", "--model", MODEL]),
    "tokenloom reconstruct": ("--out", ["/nowhere/a.png", "--model", MODEL]),
    "tokenloom convert": ("OUT", ["/nowhere/last.ckpt"]),
    "tokenloom data emoji": ("--out", []),
    "tokenloom data shapes": ("--out", []),
    "tokenloom data import": ("--out", ["coco", "/nowhere/coco"]),
    "tokenloom evaluate tokenizer": ("--out", ["--model", MODEL, "--data", DATA]),
    "tokenloom evaluate generator": ("--out", ["--model", MODEL, "--data", DATA]),
    "train_tokenizer.py": ("--run_dir", ["--config", "small_tokenizer", "--data.path", DATA]),
    "train_seq2seq.py": ("--run_dir", ["--config", "small_seq2seq", "--data.path", DATA, "--image_tokenizer", MODEL]),
    "train_matcher.py": ("--run_dir", ["--config", "emoji_matcher", "--data.path", DATA]),
    "encode_dataset.py": ("--out", ["--image_tokenizer", MODEL, "--data.path", DATA]),
    "demo": ("--out", []),
}
FILES = {
    "tokenloom export": ("OUT", ["taming", MODEL]),
    "tokenloom data check": ("--json", [DATA]),
    "tokenloom data concepts": ("--out", [DATA]),
    "tokenloom report": ("--out", ["/nowhere/run"]),
    **{f"benchmarks {name}": ("--out", []) for name in benchmarks.BENCHMARKS},
}
WRITES_NOTHING = {"tokenloom info", "tokenloom serve", "tokenloom runs", "tokenloom estimate"}
ENTRIES = {**FOLDERS, **FILES}


def command(name, place):
    """The words of a command that writes to `place`."""
    flag, inputs = ENTRIES[name]
    return [*inputs, place] if flag == "OUT" else [*inputs, flag, place]


def call(name, argv):
    """Run an entry in this process -> exit code."""
    program, *subcommands = name.split()
    if program == "tokenloom":
        return tokenloom.main([*subcommands, *argv])
    if program == "benchmarks":
        return benchmarks.main([*subcommands, *argv])
    return importlib.import_module(f"training.{program.removesuffix('.py')}").main(argv)


def test_every_command_and_script_is_known_here():
    """A new one is added above, with the option that names its place."""
    parser = data._parser()
    (of_data,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    names = {f"tokenloom {name}" for name in set(tokenloom.COMMANDS) - {"data", "evaluate"}}
    names |= {f"tokenloom data {name}" for name in of_data.choices}
    names |= {f"tokenloom evaluate {name}" for name in evaluate.SUBCOMMANDS}
    names |= {f"benchmarks {name}" for name in benchmarks.BENCHMARKS}
    scripts = [path for path in (ROOT / "training").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    names |= {"demo" if path.stem == "demo" else path.name for path in scripts}
    assert names == set(ENTRIES) | WRITES_NOTHING
    assert {"demo" if path.stem == "demo" else path.name for path in scripts} == set(SCRIPTS)


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Call an entry with a place -> the one line that it says; nothing may be made or printed."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(name, place):
        before = everything(tmp_path)
        capsys.readouterr()
        code = call(name, command(name, place))
        shown = capsys.readouterr()
        assert code == 2, shown.err
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert ENTRIES[name][0] in line, line
        assert everything(tmp_path) == before
        return line
    return run


@pytest.mark.parametrize("name", ENTRIES)
def test_a_place_that_cannot_be_made_is_refused_first(refused, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    ending = ".ckpt" if name == "tokenloom export" else ""
    assert "file is a file" in refused(name, f"{tmp_path}/file/sub{ending}")
    assert "nothing can be made in /proc" in refused(name, f"/proc/results{ending}")
    assert "name too long" in refused(name, f"{tmp_path}/{'n' * 300}{ending}")
    assert "is empty" in refused(name, "")
    assert "dangling" in refused(name, f"{tmp_path}/dangling")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_is_no_folder(refused, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file: is a file; give a folder" in refused(name, f"{tmp_path}/file")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_is_no_file(refused, tmp_path, name):
    (tmp_path / "folder").mkdir()
    words = "exists already" if name == "tokenloom export" else "is a folder; give a file's name"
    assert words in refused(name, f"{tmp_path}/folder")


@pytest.mark.parametrize("name", [
    "tokenloom convert", "tokenloom data emoji", "tokenloom data shapes", "tokenloom evaluate tokenizer",
    "tokenloom evaluate generator", "encode_dataset.py", "demo"])
def test_a_folder_of_others_is_kept(refused, tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    line = refused(name, f"{tmp_path}/theirs")
    assert "holds other files (thesis.txt)" in line or "not empty, and not an earlier build" in line


@pytest.mark.parametrize("name", ENTRIES)
def test_a_full_disk_is_refused_first(refused, tmp_path, monkeypatch, name):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "no space left on device" in refused(name, f"{tmp_path}/new.ckpt")


@pytest.mark.parametrize(("option", "value"), [("--save-reference", "{}/file/r.npz"), ("--save-reference", "/proc/r.npz")])
def test_a_second_place_is_checked_too(tmp_path, capsys, option, value):
    (tmp_path / "file").write_text("mine")
    argv = ["evaluate", "tokenizer", "--model", MODEL, "--data", DATA, "--out", str(tmp_path / "out"),
            option, value.format(tmp_path)]
    assert tokenloom.main(argv) == 2
    assert f"{option} {value.format(tmp_path)}: cannot be written to" in capsys.readouterr().err


WALK = """
import io, json, runpy, sys
from contextlib import redirect_stderr
results = []
for name, argv in json.load(sys.stdin):
    program, *subcommands = name.split()
    sys.argv = [program, *subcommands, *argv]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            if program == "tokenloom":
                runpy.run_path("tokenloom.py", run_name="__main__")
            elif program.endswith(".py"):
                runpy.run_path("training/" + program, run_name="__main__")
            else:
                runpy.run_module({"demo": "training.demo"}.get(program, program), run_name="__main__")
        code = None
    except SystemExit as stopped:
        code = stopped.code
    results.append([name, code, said.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


@pytest.mark.long
def test_nothing_slow_is_imported_for_a_refusal(tmp_path):
    """As programs: within half a second instead of the several that torch takes."""
    (tmp_path / "file").write_text("mine")
    place = f"{tmp_path}/file/sub.ckpt"
    calls = [(name, command(name, place)) for name in ENTRIES]
    # the place of a config file counts as well
    recipe = tmp_path / "run.yaml"
    recipe.write_text(json.dumps({"run_dir": place}))
    calls.append(("train_tokenizer.py", ["--config", str(recipe)]))
    done = subprocess.run([sys.executable, "-c", WALK], input=json.dumps(calls), cwd=ROOT, env=launching.environment(),
                          capture_output=True, text=True, check=True)
    for name, code, said, has_torch in json.loads(done.stdout):
        assert code == 2, (name, said)
        assert said.count("\n") == 1, said
        assert "file is a file" in said
        assert not has_torch, name


@pytest.mark.long
def test_of_several_processes_the_first_of_a_machine_says_it(tmp_path):
    (tmp_path / "file").write_text("mine")
    for local_rank, lines in (("0", 1), ("1", 0)):
        environment = {**launching.environment(), "RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": "2"}
        done = subprocess.run([sys.executable, "training/train_matcher.py", "--run_dir", str(tmp_path / "file")], cwd=ROOT,
                              env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == lines


def test_help_and_wrong_options_come_before_the_place(capsys):
    with pytest.raises(SystemExit) as stopped:
        tokenloom.main(["generate", "--out", "/proc/x", "--help"])
    assert stopped.value.code == 0
    assert tokenloom.main(["generate", "a", "--modle", "m", "--out", "/proc/x"]) == 2
    assert "--modle" in capsys.readouterr().err
