"""`tokenloom train` and the launcher: devices, exit codes, a stop that waits for the checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tokenloom_common.errors import RunFailedError, StoppedBySignalError, UserError
from training.autotrain import launching, stage
from training.autotrain.launching import launch, launcher_devices


@pytest.mark.long
def test_a_script_that_fails_ends_with_its_exit_code():
    with pytest.raises(RunFailedError, match=r"train_tokenizer\.py ended with exit code 2") as failed:
        launch("train_tokenizer.py", "--nonsense", "1")
    assert failed.value.exit_code == 2


@pytest.mark.parametrize(("visible", "options"), [
    (None, ["--num_accelerators", "2"]), ("3, 5,6", ["--include", "localhost:3,5"]), ("GPU-8f2", None)])
def test_the_launcher_gets_the_gpus_that_the_user_chose(monkeypatch, visible, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if options is None:
        with pytest.raises(UserError, match="takes numbers alone"):
            launcher_devices()
    else:
        assert launcher_devices() == options


def best_of(run_dir: Path, step: int, newest: int) -> None:
    """Write a run's folder with two checkpoints, of which one measured best."""
    for number in (step, newest):
        (run_dir / "checkpoints" / f"step-{number:08d}").mkdir(parents=True, exist_ok=True)
    for name in ("text_tokenizer", "model"):
        (run_dir / name).mkdir()
    (run_dir / "latest.json").write_text("{}")
    (run_dir / "best.json").write_text(json.dumps({"step": step, "checkpoint": f"checkpoints/step-{step:08d}"}))


def test_the_best_checkpoint_becomes_the_model(tmp_path, monkeypatch):
    asked = []

    def export(script: str, *arguments: object) -> bool:
        folder = tmp_path / "run_best"
        asked.append((script, arguments))
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "latest.json", "text_tokenizer"]
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020"]
        (folder / "model").mkdir()
        (folder / "model" / "best").touch()
        return True

    monkeypatch.setattr(stage, "launch", export)
    best_of(tmp_path / "run", 20, 60)
    stage.export_best("train.py", tmp_path / "run", ["--seed", 1])
    assert asked == [("train.py", ("--seed", 1, "--run_dir", tmp_path / "run_best", "--train.steps", 20))]
    assert (tmp_path / "run" / "model" / "best").exists()
    assert not (tmp_path / "run_best").exists()


@pytest.mark.parametrize("measured", [False, True])
def test_the_newest_checkpoint_is_not_exported_twice(tmp_path, monkeypatch, measured):
    monkeypatch.setattr(stage, "launch", lambda *arguments: pytest.fail("launched"))
    best_of(tmp_path / "run", 60, 60)
    if not measured:
        (tmp_path / "run" / "best.json").unlink()
    stage.export_best("train.py", tmp_path / "run", [])
    assert (tmp_path / "run" / "model").is_dir()


SAVES_ON_SIGNAL = """
import pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text("started")
time.sleep(100)
"""


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Replace the launcher's command by a shell that starts one script, which saves on SIGTERM."""
    script, note = tmp_path / "script.py", tmp_path / "note"
    script.write_text(SAVES_ON_SIGNAL)
    launcher = f'"{sys.executable}" "{script}" "{note}"; exit 0'
    real = launching._started
    monkeypatch.setattr(launching, "_started", lambda command: real(["sh", "-c", launcher]))
    return note


def wait_for_start(note: Path) -> None:
    while not note.exists() or note.read_text() != "started":
        time.sleep(0.05)


@pytest.mark.long
def test_a_script_that_is_asked_to_stop_saves_first(launched):
    def look() -> bool:
        return launched.exists() and launched.read_text() == "started"

    assert launch("train_tokenizer.py", look=look) is False
    assert launched.read_text() == "saved"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_checkpoint_and_ends_with_its_code(launched, number):
    before = signal.getsignal(number)

    def interrupt() -> None:
        wait_for_start(launched)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(StoppedBySignalError) as stopped:
        launch("train_tokenizer.py")
    assert launched.read_text() == "saved"
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
