"""The wheel holds every package and recipe, and runs without the source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import launching, tiny

PACKAGES = ("tokenizer_image", "seq2seq", "inference", "training", "benchmarks", "tokenloom_common")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build from a copy of the source, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=launching.REPOSITORY, capture_output=True, check=True, text=True)
    for name in names.stdout.split("\0"):
        path = launching.REPOSITORY / name
        if name and path.is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                    "--wheel-dir", str(folder), str(source)], check=True, capture_output=True)
    return next(folder.glob("tokenloom-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.long
def test_every_source_file_and_recipe_is_in_the_wheel(installed):
    for package in PACKAGES:
        for path in (launching.REPOSITORY / package).rglob("*"):
            if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts:
                assert (installed / path.relative_to(launching.REPOSITORY)).is_file(), path
    assert (installed / "tokenloom.py").is_file()
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


@pytest.mark.long
def test_the_wheel_generates_pictures_without_the_source(installed, tmp_path):
    tiny.model_folder(tmp_path / "model")
    code = ("import sys, inference, tokenloom\n"
            "print(inference.__file__)\n"
            "sys.exit(tokenloom.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "generate", "a red heart", "--model", "model", "--out", "pictures"],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))  # not the tree that the tests run in
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
