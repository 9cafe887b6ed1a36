"""Checkpoints that are damaged, and saves that fail or are killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.fake_runs import (
    FakeEngine,
    RandomStateKept,
    latest,
    names,
    saved,
    state,
    step_of,
    task_state,
)
from tokenloom_common import files
from tokenloom_common.errors import ResumeError, RunFailedError
from training.runs import manifest as manifest_module
from training.runs import run_state as run_state_module
from training.runs.run_state import MANIFEST


@pytest.fixture(autouse=True)
def _random_state_of_other_tests():
    with RandomStateKept():
        yield


# ---- damage ----

def _truncate(folder: Path) -> None:
    path = folder / "deepspeed/states.pt"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = folder / "ranks/rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _newer(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 99}))


def _changed(folder: Path, **values: int) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | values))


def _forbid(path: Path) -> None:
    """Root may read everything: what the system says to others is said by the reader here."""
    FORBIDDEN.add(path)


FORBIDDEN: set[Path] = set()


@pytest.fixture(autouse=True)
def _forbidden_files_are_not_read(monkeypatch):
    real = manifest_module.file_hash

    def hashed(path: Path) -> str:
        if path in FORBIDDEN:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(manifest_module, "file_hash", hashed)
    yield
    FORBIDDEN.clear()


DAMAGE = {
    "truncated file": (_truncate, "deepspeed/states.pt is damaged"),
    "flipped bit": (_flip, "ranks/rank0.safetensors is damaged"),
    "missing file": (lambda f: (f / "ranks/rank0.safetensors").unlink(), "ranks/rank0.safetensors is missing"),
    "missing folder": (lambda f: shutil.rmtree(f / "deepspeed"), "deepspeed/states.pt is missing"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), "MANIFEST.json cannot be read (FileNotFoundError)"),
    "empty manifest": (lambda f: (f / MANIFEST).write_bytes(b""), "MANIFEST.json cannot be read (JSONDecodeError)"),
    "half a manifest": (lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:90]), "MANIFEST.json cannot be read"),
    "a list as manifest": (lambda f: (f / MANIFEST).write_text("[]"), "MANIFEST.json cannot be read (TypeError)"),
    "noise as manifest": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), "MANIFEST.json cannot be read"),
    "newer schema": (_newer, "its schema 99 is newer than this release reads (1)"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "MANIFEST.json cannot be read"),
    "older schema": (partial(_changed, schema_version=0), "its schema 0 is older than this release reads (1)"),
    "wrong world size": (partial(_changed, world_size=2), "it is of 2 processes and holds the state of 1"),
    "zero length": (lambda f: (f / "deepspeed/states.pt").write_bytes(b""), "deepspeed/states.pt is damaged"),
    "no permission": (lambda f: _forbid(f / "deepspeed/states.pt"), "deepspeed/states.pt cannot be read (permission denied)"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage, words):
    it = saved(tmp_path, 5, 10)
    damage(tmp_path / "checkpoints/step-00000010")
    with caplog.at_level(logging.WARNING):
        assert step_of(it.find()) == 5
    (warning,) = caplog.messages
    assert "step-00000010 is not usable" in warning
    assert words in warning
    assert "trying the one before" in warning


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_when_every_checkpoint_is_damaged_the_run_is_refused(tmp_path, resume):
    saved(tmp_path, 5, 10)
    for name in names(tmp_path):
        _truncate(tmp_path / "checkpoints" / name)
    with pytest.raises(ResumeError, match=r"none of 2 checkpoints is whole.*--checkpoint\.resume never") as caught:
        state(tmp_path, checkpoint={"resume": resume}).find()
    assert caught.value.exit_code == 3


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    it = saved(tmp_path, 5)
    monkeypatch.setattr(run_state_module, "save_file", lambda *_: (_ for _ in ()).throw(
        OSError(errno.ENOSPC, "No space left on device")))
    words = r"no space left .* step 10 was not written; step-00000005 is whole; free some"
    with pytest.raises(RunFailedError, match=words) as full:
        it.save(FakeEngine(10), 10, {})
    assert full.value.exit_code == 1
    assert step_of(state(tmp_path).find()) == 5
    monkeypatch.undo()
    again = state(tmp_path)
    again.prepare()
    assert not list((tmp_path / "checkpoints").glob(".*"))


# ---- crashes while saving ----

class BrokenEngine(FakeEngine):
    """Fails after it wrote half of its files."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_checkpoint_before_and_latest_as_they_were(tmp_path):
    it = saved(tmp_path, 5)
    with pytest.raises(RunFailedError, match="no space left"):
        it.save(BrokenEngine(9), 10, {})
    assert names(tmp_path) == ["step-00000005"]
    assert latest(tmp_path)["step"] == 5
    assert step_of(it.find()) == 5
    it.save(FakeEngine(10), 10, {})  # the leftovers are not in the way
    assert step_of(it.find()) == 10


@pytest.mark.parametrize("where", ["write_json_atomic", "publish_folder"])
def test_a_publication_that_fails_leaves_the_checkpoint_before_and_latest_as_they_were(tmp_path, monkeypatch, where):
    it = saved(tmp_path, 5)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_state_module, where, fail)
    with pytest.raises(KeyboardInterrupt):
        it.save(FakeEngine(10), 10, {})
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000005"]
    assert latest(tmp_path)["step"] == 5
    assert step_of(it.find()) == 5


KILLED = {  # where the process dies -> (the step that a resumed run finds, the step that latest.json names)
    "engine": (5, 5), "rank file": (5, 5), "manifest": (5, 5), "first flush": (5, 5), "before rename": (5, 5),
    "after rename": (10, 5), "latest": (10, 5), "deleting": (10, 10),
}


def _die(*_) -> None:
    os._exit(9)


def _arm(where: str) -> FakeEngine:
    """In the forked child: make one function of the saving end the process."""
    engine = FakeEngine(10)
    rename, write = os.rename, run_state_module.write_json_atomic
    if where == "engine":
        engine.save = _die
    elif where == "rank file":
        run_state_module.save_file = _die
    elif where == "manifest":
        run_state_module.write_json_atomic = lambda path, value: path.write_text("{") and _die()
    elif where == "first flush":
        files.sync_path = _die
    elif where == "before rename":
        files.os.rename = _die
    elif where == "after rename":
        files.os.rename = lambda a, b: (rename(a, b), _die())
    elif where == "latest":
        run_state_module.write_json_atomic = lambda path, value: _die() if path.name == "latest.json" else write(path, value)
    elif where == "deleting":
        run_state_module.shutil.rmtree = lambda path, **_: _die() if Path(path).name == "step-00000001" else None
    return engine


@pytest.mark.parametrize("where", KILLED)
def test_a_process_killed_anywhere_while_saving_leaves_a_whole_newest_checkpoint(tmp_path, where):
    it = saved(tmp_path, 1, 3, 5)
    child = os.fork()
    if child == 0:
        try:
            it.save(_arm(where), 10, task_state(10))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9  # it did die where it was told to
    found, named = KILLED[where]
    again = state(tmp_path)
    again.prepare()
    assert step_of(again.resume_from) == found
    assert latest(tmp_path)["step"] == named
    assert (tmp_path / latest(tmp_path)["checkpoint"] / MANIFEST).is_file()
    assert not list((tmp_path / "checkpoints").glob(".*"))  # leftovers are cleared when the run starts again
    engine = FakeEngine()
    step, tensors = again.load(engine, again.resume_from)
    assert (step, engine.value, int(tensors["seen"])) == (found, found, found)


def test_a_process_killed_while_replacing_a_checkpoint_leaves_the_one_before(tmp_path):
    it = saved(tmp_path, 5, 10)
    child = os.fork()
    if child == 0:
        try:
            it.save(_arm("after rename"), 10, {})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert step_of(it.find()) == 5
    it.prepare()
    assert not list((tmp_path / "checkpoints").glob(".*"))
