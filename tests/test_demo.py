"""The demo's bookkeeping: what is reused, what is made again. `.ci/run` runs the whole demo at its quick size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenloom_common.errors import RunFailedError, UserError
from training import demo
from training.autotrain.places import training_folder
from training.autotrain.recipes import check_overrides
from training.demo import SIZES, Demo
from training.places import check_demo_folder


def run_phases(out: Path, inputs: str, calls: list[str]) -> Demo:
    """Two chained phases; `calls` notes what was really made."""
    trial = Demo(out, "quick", 0)

    def make(name: str) -> None:
        calls.append(name)
        (out / name).write_text("made")

    trial.phase("first", inputs, out / "first", lambda: make("first"))
    trial.phase("second", "", out / "second", lambda: make("second"))
    return trial


@pytest.mark.parametrize("size", SIZES)
def test_the_keys_of_each_size_are_those_of_the_scripts(tmp_path, size):
    check_overrides(Demo(tmp_path, size, 0).options.overrides)


def test_a_second_run_reuses_what_is_done_and_says_so(tmp_path, caplog):
    calls: list[str] = []
    assert [p["reused"] for p in run_phases(tmp_path, "a", calls).phases.values()] == [False, False]
    with caplog.at_level("INFO"):
        again = run_phases(tmp_path, "a", calls)
    assert calls == ["first", "second"]
    assert [p["reused"] for p in again.phases.values()] == [True, True]
    assert caplog.text.count("reused") == 2


def test_a_changed_input_makes_its_phase_and_all_later_ones_again(tmp_path):
    calls: list[str] = []
    run_phases(tmp_path, "a", calls)
    run_phases(tmp_path, "b", calls)
    assert calls == ["first", "second"] * 2


def test_a_missing_result_is_made_again(tmp_path):
    calls: list[str] = []
    run_phases(tmp_path, "a", calls)
    (tmp_path / "second").unlink()
    run_phases(tmp_path, "a", calls)
    assert calls == ["first", "second", "second"]


def test_a_phase_that_fails_is_not_noted_as_done(tmp_path):
    trial = Demo(tmp_path, "quick", 0)

    def fail() -> None:
        (tmp_path / "first").write_text("half")
        raise RunFailedError("no")

    with pytest.raises(RunFailedError):
        trial.phase("first", "a", tmp_path / "first", fail)
    calls: list[str] = []
    run_phases(tmp_path, "a", calls)
    assert calls == ["first", "second"]


def test_a_killed_training_is_continued_and_another_one_is_not(tmp_path):
    trial = Demo(tmp_path, "quick", 0)
    folder = trial.continued_folder("seq2seq")
    folder.mkdir()
    (folder / "checkpoint").write_text("x")
    assert (trial.continued_folder("seq2seq") / "checkpoint").exists()
    trial._chain = "another recipe"
    assert not trial.continued_folder("seq2seq").exists()


def test_wrong_arguments_are_one_line(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--size", "fulll"]) == 2
    (tmp_path / "file").write_text("mine")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "unknown --size 'fulll'; did you mean 'full'?" in lines[0]
    assert "is a file" in lines[1]
    with pytest.raises(UserError):
        Demo(tmp_path, "huge", 0)


def test_a_begun_demo_may_go_on_in_its_folder(tmp_path):
    folder = tmp_path / "demo"
    begun = Demo(folder, "quick", 0)
    for path in (begun.data, begun.model, training_folder(begun.model)):
        path.mkdir(parents=True)
    check_demo_folder(folder)


def test_another_seed_in_the_same_folder_is_refused_before_any_work(tmp_path):
    begun = Demo(tmp_path, "quick", 0)
    training = training_folder(begun.model)
    training.mkdir()
    (training / "plan.json").write_text(json.dumps({"arguments": begun.options.plain()}))
    with pytest.raises(UserError, match="begun with another --seed \\(0, not 1\\)"):
        Demo(tmp_path, "quick", 1).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.training"]


def test_the_report_names_every_phase_in_seconds(tmp_path, capsys):
    trial = run_phases(tmp_path, "a", [])
    (tmp_path / "report.json").write_text(json.dumps(
        {"caption_accuracy": 0.9, "reconstruction_psnr": 23.0}))
    trial._finish_report()
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["seconds"]) == {"first", "second", "all"}
    assert report["reused"] == []
    assert report["environment"]["cpus"] >= 1
    assert "caption_accuracy: 0.900" in capsys.readouterr().out
