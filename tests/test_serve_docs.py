"""What docs/serving.md shows runs as it stands, on a server of a tiny model, and its table says the limits that hold."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from inference.commands.serve import _parser
from inference.image_files.read import read_recipe
from inference.serving import limits
from inference.serving.openai_api import ImageRequest
from tests import launching, tiny
from tests.serving_process import Process
from tests.test_readme import blocks

PAGE = launching.REPOSITORY / "docs" / "serving.md"


@pytest.mark.long
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_examples_run(tmp_path):
    server = Process(tiny.model_folder(tmp_path / "demo" / "model"), tmp_path / "log")
    try:
        for language, program in (("sh", ["bash", "-e", "-c"]), ("py", [sys.executable, "-c"])):
            [block] = blocks(PAGE, language)
            done = subprocess.run([*program, block.replace("http://127.0.0.1:8000", server.url)], cwd=tmp_path,
                                  env=launching.environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            if language == "sh":
                assert "event: image_generation.completed" in done.stdout
                assert "tokenloom_images_total" in done.stdout
            else:
                assert "size Error code: 400 - size: this model draws 16x16" in done.stdout
    finally:
        server.close()
    assert Image.open(tmp_path / "octopus.png").size == (16, 16)
    assert read_recipe((tmp_path / "octopus-9.webp").read_bytes(), "it").seed == 9


def test_the_page_names_every_field_and_option():
    text = PAGE.read_text(encoding="utf-8")
    for field in ImageRequest.model_fields:
        assert f"`{field}`" in text, field
    shown = {"--safety-words", "--weights", "--threads", "--device", "--help"}  # as in other commands
    options = {option for action in _parser()._actions for option in action.option_strings if option.startswith("--")}
    assert not {option for option in options - shown if option not in text}


def test_the_table_says_the_limits_that_hold():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    own = limits.Limits()
    for words in (f"body | {limits.MAX_BODY_BYTES // 1024} KiB", f"{limits.MAX_REQUEST_PROMPT:,} characters each",
                  f"pictures a request | {own.max_n} ", f"requests that wait | {own.queue} ",
                  f"| {own.deadline:g} s (`--deadline`)",
                  f"connections | {own.connections} ", f"signal | {own.drain:g} s",
                  f"{limits.MAX_HEADER_BYTES // 1024} KiB; {own.read:g} s; {own.write:g} s without progress"):
        assert words in text, words
