"""Run the commands and code of README and docs as they stand, in a folder of their own (training with fewer steps)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import launching, tiny
from tests.llamagen_reference import Sizes
from tests.llamagen_reference import make_state as make_gpt
from tests.vqgan_references import Shape
from tests.vqgan_references import make_state as make_vqgan

README = launching.REPOSITORY / "README.md"
INDEX = launching.REPOSITORY / "docs" / "README.md"
GATE = [launching.REPOSITORY / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = [README, *sorted((launching.REPOSITORY / "docs").glob("*.md"))]
PACKAGES = ("tokenizer_image", "seq2seq", "inference", "training", "benchmarks", "tokenloom_common", "tests", "docs")
FEWER = {"training/train_tokenizer.py": ["--train.steps", "2", "--train.batch_size", "4", "--model.channels", "32"],
         "training/train_seq2seq.py": ["--train.steps", "2", "--train.batch_size", "4", "--model.width", "64",
                                       "--model.encoder_layers", "1", "--model.decoder_layers", "1"],
         "train": ["--minutes", "1"],  # of `tokenloom train`: the last one counts
         "llamagen-gpt": ["--config", "heads.json"]}  # whose published sizes are known by their shapes
NOT_RUN = ("git ", "make ", "pip ")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the README takes for granted: the scripts, a trained demo, somebody's pictures."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "training").symlink_to(launching.REPOSITORY / "training")
    tiny.model_folder(folder / "demo" / "model")
    (folder / "my_pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (70, 80), (number * 20, 90, 200 - number * 10)).save(folder / "my_pictures" / f"p{number}.png")
        (folder / "my_pictures" / f"p{number}.txt").write_text(f"a picture of number {number}\n")
    Image.new("RGB", (30, 30), "red").save(folder / "cat.png")
    published = Shape(names="llamagen", multipliers=(1,) * 5, attention=(4,))  # f16, as its codes are
    torch.save({"model": make_vqgan(published)}, folder / "vq_ds16_c2i.pt")
    torch.save({"model": make_gpt(Sizes(codes=published.codes, side=16, classes=1001))}, folder / "c2i_B_256.pt")
    (folder / "heads.json").write_text('{"n_head": 2}')
    return folder


def run(command: list[str], place: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=place, env=launching.environment(), capture_output=True, text=True, timeout=400,
                          check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_commands_run(place):
    lines = [*commands(README), *commands(INDEX)]
    ran = []
    for line in lines:
        if line.startswith(NOT_RUN):
            continue
        words = shlex.split(line)
        extra = next((FEWER[word] for word in words if word in FEWER), [])
        port = ["--master_port", str(launching.free_port())] if words[0] == "deepspeed" else []
        result = run([words[0], *port, *words[1:], *extra], place)
        assert result.returncode == 0, f"{line}\n{result.stderr[-3000:]}"
        ran.append(line)
    assert len(ran) >= 16
    assert len(list((place / "pictures").glob("a-cat-on-a-chair-seed*.png"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_run(page, place):
    for number, block in enumerate(blocks(page, "python")):
        if "tokens/train-00000" in block:
            (place / "tokens").exists() or shutil.copytree(place / "runs" / "tokens", place / "tokens")
        result = run([sys.executable, "-c", block], place)
        assert result.returncode == 0, f"{page.name} block {number}\n{result.stderr[-3000:]}"


def test_there_are_pages_with_examples():
    assert len(PAGES) >= 4
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 4


def test_the_make_targets_that_are_named_exist():
    named = {target for page in PAGES for target in re.findall(r"`?make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert {"demo", "test", "setup", "lint"} <= named
    for target in named:
        done = subprocess.run(["make", "-n", target], cwd=launching.REPOSITORY, capture_output=True, text=True, check=False,
                              env={**os.environ, "VENV": ""})
        assert done.returncode == 0, done.stderr


def test_links_to_files_lead_somewhere():
    for page in [*PAGES, *GATE]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def folders(package: str) -> list[str]:
    """A package's own folders with Python in them."""
    found = {path.parent.name for path in (launching.REPOSITORY / package).glob("*/*.py")}
    return sorted(found - {"__pycache__"})


def test_the_readme_names_every_package_and_every_folder_of_the_two_large_ones():
    listing = README.read_text(encoding="utf-8").split("## Folders")[1].split("```")[1]
    named = set(re.findall(r"\b[a-z0-9_]+(?=/)", listing))
    assert set(PACKAGES) <= named
    assert {*folders("inference"), *folders("training")} <= named


def test_the_architecture_page_names_every_folder():
    page = (launching.REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[a-z0-9_]+(?=/)", page))
    for package in ("inference", "training"):
        assert set(folders(package)) <= named
    for inner in (*folders("inference/checkpoints"), *folders("inference/decoder"), *folders("training/data")):
        assert inner in named


def test_every_page_is_in_the_index():
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", INDEX.read_text(encoding="utf-8")))
    assert linked == {page.name for page in INDEX.parent.glob("*.md")} - {"README.md"}


def test_every_package_says_what_its_folder_holds():
    for package in PACKAGES[:6]:
        for folder in {path.parent for path in (launching.REPOSITORY / package).rglob("*.py")}:
            if folder.name == "__pycache__":
                continue
            first = (folder / "__init__.py").read_text(encoding="utf-8").splitlines()[0]
            assert first.startswith('"""') and first.rstrip('"').endswith("."), f"{folder}/__init__.py: {first}"
