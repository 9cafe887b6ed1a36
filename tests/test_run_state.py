"""Run folders: checkpoints that are found, kept and refused, random numbers, the log of a resumed run."""

from __future__ import annotations

import json
import random

import numpy
import pytest
import torch
import yaml

from tests.fake_runs import (
    ALONE,
    TWO,
    FakeEngine,
    FirstOfTwo,
    RandomStateKept,
    config,
    latest,
    names,
    saved,
    state,
    step_of,
    task_state,
)
from tokenloom_common.errors import ResumeError, UserError
from training.config.run import RunConfig
from training.loop.log import RunLog
from training.runs.metrics import read_metrics
from training.runs.random_state import seed_everything
from training.runs.run_state import MANIFEST


@pytest.fixture(autouse=True)
def _random_state_of_other_tests():
    with RandomStateKept():
        yield


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


@pytest.mark.parametrize("content", [b"", b"{", b'{"step": 3}'])
def test_what_latest_says_decides_nothing(tmp_path, content):
    it = saved(tmp_path, 5, 10)
    (tmp_path / "latest.json").write_bytes(content)
    assert step_of(it.find()) == 10
    (tmp_path / "latest.json").unlink()
    assert step_of(it.find()) == 10


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    it = state(tmp_path, checkpoint={"keep_last": 1, "every_steps": 5, "keep_every_steps": 10})
    it.prepare()
    for step in (5, 10, 15, 20, 25):
        it.save(FakeEngine(step), step, {})
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000025"]
    with pytest.raises(UserError, match="keep_every_steps 7 must be a multiple of every_steps 5"):
        state(tmp_path, checkpoint={"every_steps": 5, "keep_every_steps": 7})


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


@pytest.mark.parametrize("name", ["notes.txt", "a-red-heart-seed0.png"])
def test_files_of_others_where_the_export_goes_are_found_when_the_run_goes_on(tmp_path, name):
    saved(tmp_path, 5)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    state(tmp_path, train={"steps": 10}).prepare()
    (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match=rf"model: holds other files \({name}\)"):
        state(tmp_path, train={"steps": 10}).prepare()
    state(tmp_path, train={"steps": 5}).prepare()  # complete: exports nothing
    # starting over moves the folder out of the way
    state(tmp_path, train={"steps": 10}, checkpoint={"resume": "never"}).prepare()
    assert (tmp_path / "before-1" / "model" / name).is_file()
