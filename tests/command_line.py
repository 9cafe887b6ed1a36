"""Run `tokenloom ...` inside a test: its exit code and what it printed, without the progress bar."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import tokenloom
from tests import tiny

BAR = re.compile(r"(generate|reconstruct): +\d+%\|")  # tqdm's lines on stderr


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without the progress bar


def runner(capsys) -> Callable[..., Ran]:
    """tokenloom.main with arguments -> exit code, lines of stdout, lines of stderr."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = tokenloom.main([str(a) for a in arguments])
        except SystemExit as stopped:  # argparse's --help
            code = stopped.code
        shown = capsys.readouterr()
        errors = [line for line in shown.err.splitlines() if line and not BAR.match(line)]
        return Ran(code, shown.out.splitlines(), errors)
    return call


def contents(path: Path) -> dict[str, bytes]:
    """The files of a folder by name; none where there is no folder."""
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {}


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Ran]:
    """`run("generate", ...)` runs that command; a file of tests takes it by `run = command_line.run`."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model's folder."""
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")
