"""Checkpoints appear whole or not at all, damage is seen, random numbers continue, and the log follows."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from tokenloom_common import files
from tokenloom_common.errors import ResumeError, RunFailedError, UserError
from training.config.run import RunConfig
from training.engine.processes import Processes
from training.loop.log import RunLog
from training.runs import manifest as manifest_module
from training.runs import run_state as run_state_module
from training.runs.metrics import read_metrics
from training.runs.random_state import seed_everything
from training.runs.run_state import MANIFEST, RunState

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class FirstOfTwo(Processes):
    """The first of two processes, of which the other has the same to say."""

    def first_does(self, action):
        return action()

    def gather(self, value):
        return [value, value]


TWO = FirstOfTwo(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))


class FakeEngine:
    """Keeps one number; writes it as DeepSpeed's part of a checkpoint."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "states.pt").write_bytes(f"{self.value:>200}".encode())

    def load(self, folder: Path, resharded: bool = False) -> None:
        self.resharded = resharded
        self.value = int((folder / "deepspeed" / "states.pt").read_text())


def config(run: Path, **changes) -> RunConfig:
    return RunConfig.parse({"run_dir": str(run), "checkpoint": {"keep_last": 3}, **changes}, "test")


def state(run: Path, group: Processes = ALONE, **changes) -> RunState:
    return RunState(config(run, **changes), group)


def task_state(step: int) -> dict[str, torch.Tensor]:
    return {"seen": torch.tensor(step), "usage": torch.full((3, 2), step / 7).T}


def saved(run: Path, *steps: int) -> RunState:
    """A prepared run with checkpoints at some steps."""
    it = state(run)
    it.prepare()
    for step in steps:
        it.save(FakeEngine(step), step, task_state(step))
    return it


def names(run: Path) -> list[str]:
    """What lies in checkpoints/ and is seen as one."""
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def latest(run: Path) -> dict:
    return json.loads((run / "latest.json").read_text())


def step_of(path: Path | None) -> int | None:
    return None if path is None else int(path.name.removeprefix("step-"))


@pytest.fixture(autouse=True)
def _random_state_of_other_tests():
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    torch.set_rng_state(before[2])


# ---- saving and finding ----

def test_what_was_saved_comes_back(tmp_path):
    it = saved(tmp_path, 5, 10)
    assert it.find() == tmp_path / "checkpoints/step-00000010"
    engine = FakeEngine()
    step, tensors = it.load(engine, it.find())
    assert (step, engine.value) == (10, 10)
    assert tensors.keys() == {"seen", "usage"}
    assert all(torch.equal(tensors[name], value) for name, value in task_state(10).items())
    assert latest(tmp_path) == {"step": 10, "checkpoint": "checkpoints/step-00000010"}


def test_another_number_of_processes_loads_the_same_and_new_ones_draw_their_own_numbers(tmp_path):
    saved(tmp_path, 5)
    drawn = {}
    for rank in (0, 1):
        it, engine = state(tmp_path, FirstOfTwo(rank, 2, rank, torch.device("cpu"))), FakeEngine()
        step, tensors = it.load(engine, tmp_path / "checkpoints/step-00000005")
        assert (step, engine.value, engine.resharded, it.resharded) == (5, 5, True, True)
        assert torch.equal(tensors["seen"], task_state(5)["seen"])
        drawn[rank] = torch.rand(3).tolist()
    alone, engine = state(tmp_path), FakeEngine()
    alone.load(engine, tmp_path / "checkpoints/step-00000005")
    assert not engine.resharded
    assert torch.rand(3).tolist() == drawn[0] != drawn[1]


def test_the_manifest_names_every_file_with_its_size(tmp_path):
    saved(tmp_path, 5)
    folder = tmp_path / "checkpoints/step-00000005"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert {f["name"]: f["size"] for f in manifest["files"]} == {
        name: (folder / name).stat().st_size for name in ("deepspeed/states.pt", "ranks/rank0.safetensors")}
    assert (manifest["step"], manifest["world_size"], manifest["batch_size"], manifest["seed"]) == (5, 1, 32, 0)


def test_a_run_folder_gets_its_config_and_its_environment(tmp_path):
    saved(tmp_path / "run")
    assert RunConfig.parse(yaml.safe_load((tmp_path / "run/config.yaml").read_text()), "x") == config(tmp_path / "run")
    assert json.loads((tmp_path / "run/env.json").read_text())["packages"]["torch"]
    assert (tmp_path / "run/samples").is_dir()


def test_the_newest_step_is_found_by_number_not_by_the_order_of_saving(tmp_path):
    it = saved(tmp_path, 99_999_999, 5, 1000)
    assert step_of(it.find()) == 99_999_999


def test_only_the_last_ones_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_never_pushes_out_the_one_just_saved(tmp_path, keep):
    it = saved(tmp_path, 40, 60)
    (tmp_path / "checkpoints/step-00000060/deepspeed/states.pt").write_bytes(b"")
    it = state(tmp_path, checkpoint={"keep_last": keep})
    it.prepare()
    assert step_of(it.resume_from) == 40
    it.save(FakeEngine(50), 50, {})
    assert step_of(it.find()) == 50
    assert ("step-00000040" in names(tmp_path)) == (keep == 2)


def test_a_step_that_is_repeated_replaces_its_damaged_checkpoint(tmp_path):
    it = saved(tmp_path, 40, 60)
    (tmp_path / "checkpoints/step-00000060" / MANIFEST).unlink()
    it.save(FakeEngine(61), 60, {})
    engine = FakeEngine()
    assert it.load(engine, it.find())[0] == 60
    assert engine.value == 61


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


@pytest.mark.parametrize("content", [b"", b"{", b'{"step": 3}'])
def test_what_latest_says_decides_nothing(tmp_path, content):
    it = saved(tmp_path, 5, 10)
    (tmp_path / "latest.json").write_bytes(content)
    assert step_of(it.find()) == 10
    (tmp_path / "latest.json").unlink()
    assert step_of(it.find()) == 10


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


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    it = state(tmp_path, checkpoint={"keep_last": 1, "every_steps": 5, "keep_every_steps": 10})
    it.prepare()
    for step in (5, 10, 15, 20, 25):
        it.save(FakeEngine(step), step, {})
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000025"]
    with pytest.raises(UserError, match="keep_every_steps 7 must be a multiple of every_steps 5"):
        state(tmp_path, checkpoint={"every_steps": 5, "keep_every_steps": 7})


@pytest.mark.parametrize("resume", ["auto", "required"])
def test_when_every_checkpoint_is_damaged_the_run_is_refused(tmp_path, resume):
    saved(tmp_path, 5, 10)
    for name in names(tmp_path):
        _truncate(tmp_path / "checkpoints" / name)
    with pytest.raises(ResumeError, match=r"none of 2 checkpoints is whole.*--checkpoint\.resume never") as caught:
        state(tmp_path, checkpoint={"resume": resume}).find()
    assert caught.value.exit_code == 3


def test_without_checkpoints_a_run_starts_fresh_unless_resuming_is_required(tmp_path):
    assert saved(tmp_path).find() is None
    with pytest.raises(ResumeError, match="no checkpoint to resume from") as caught:
        state(tmp_path, checkpoint={"resume": "required"}).find()
    assert caught.value.exit_code == 3
    assert state(tmp_path / "new").find() is None


def test_starting_over_uses_no_checkpoint_and_keeps_the_old_run(tmp_path):
    saved(tmp_path, 5, 10)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    (tmp_path / "notes.txt").write_text("mine")
    it = state(tmp_path, checkpoint={"resume": "never", "keep_last": 1})
    it.prepare()
    assert it.resume_from is None
    assert names(tmp_path) == []
    assert sorted(p.name for p in (tmp_path / "before-1/checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    assert (tmp_path / "before-1/metrics.jsonl").is_file()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    it.save(FakeEngine(2), 2, {})
    assert step_of(state(tmp_path).find()) == 2  # not the later steps of the run before
    state(tmp_path, checkpoint={"resume": "never"}).prepare()
    assert (tmp_path / "before-2/checkpoints/step-00000002").is_dir()


@pytest.mark.parametrize(("changes", "group", "words"), [
    ({"seed": 1}, TWO, "seed 0 then, 1 now"),
    ({"train": {"batch_size": 64}}, ALONE, "batch_size 32 then, 64 now"),
    ({"train": {"accumulation": 2}}, ALONE, "accumulation 1 then, 2 now"),
    ({"deepspeed": {"zero_stage": 3}}, ALONE, "zero_stage 1 then, 3 now"),
])
def test_a_run_of_another_kind_is_refused_and_changes_nothing(tmp_path, changes, group, words):
    saved(tmp_path, 5)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ResumeError, match=words) as caught:
        state(tmp_path, group, **changes).prepare()
    assert caught.value.exit_code == 3
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_more_steps_or_another_learning_rate_continue(tmp_path):
    saved(tmp_path, 5)
    it = state(tmp_path, train={"steps": 5000}, optim={"lr": 0.5})
    it.prepare()
    assert step_of(it.resume_from) == 5
    assert "steps: 5000" in (tmp_path / "config.yaml").read_text()


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


# ---- random numbers ----

def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), random.gauss(0, 1), float(numpy.random.rand()),
            float(numpy.random.standard_normal()), float(numpy.random.standard_normal()), *torch.randn(3).tolist(),
            *torch.rand(2).tolist(), float(torch.nn.functional.dropout(torch.ones(50), 0.5).sum())]


@pytest.mark.parametrize("half_used", [False, True])
def test_random_numbers_continue_where_the_checkpoint_was_made(tmp_path, half_used):
    it = saved(tmp_path)
    seed_everything(3, rank=0)
    draws()
    if half_used:  # each of these makes two normal numbers and keeps the second for the next call
        random.gauss(0, 1)
        numpy.random.standard_normal()
        torch.randn(1)
        assert random.getstate()[2] is not None
        assert numpy.random.get_state()[3] == 1
    it.save(FakeEngine(), 1, {})
    expected = draws()
    seed_everything(99, rank=0)
    random.gauss(0, 1)
    numpy.random.standard_normal()
    it.load(FakeEngine(), it.find())
    assert [a.hex() for a in draws()] == [b.hex() for b in expected]


def test_seeding_repeats_and_differs_between_processes():
    seed_everything(7, rank=0)
    first = draws()
    seed_everything(7, rank=0)
    assert draws() == first
    seed_everything(7, rank=1)
    assert not set(draws()[:9]) & set(first[:9])
    seed_everything((1 << 31) - 1, rank=100)


# ---- metrics.jsonl of a resumed run ----

def test_a_half_written_line_and_repeated_steps_are_gone_after_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step} for step in (1, 5, 10, 15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 20, "lo')
    assert read_metrics(path) == rows
    log = RunLog(tmp_path, True, "test", total_steps=30, first_step=10)
    log.metrics(15, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:3] == rows[:3]
    assert [(line["step"], line["loss"]) for line in lines[3:]] == [(15, 0.5)]


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    RunLog(tmp_path, True, "test", total_steps=30, first_step=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(tmp_path / "nowhere.jsonl") == []


def test_a_run_folder_in_use_by_another_process_is_refused(tmp_path):
    import fcntl

    (tmp_path / "other").mkdir()
    with (tmp_path / "other" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing there"):
            state(tmp_path / "other").prepare()
    state(tmp_path / "other").prepare()
