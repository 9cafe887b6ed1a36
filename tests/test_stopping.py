"""Runs that are ended from outside or stand still: nothing is left running, nothing hangs, and the reason is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import launching, tiny
from training.engine import stopping
from training.engine.processes import Processes
from training.engine.stopping import Launcher, StopFlag
from training.engine.watchdog import Watchdog, _place
from training.runs.metrics import read_metrics

ONE = Processes(0, 1, 0, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, rows=40)
    return folder


class Run:
    """Two ranks under `deepspeed`, training for ever."""

    def __init__(self, process: subprocess.Popen, folder: Path, said: list[str]) -> None:
        self.process, self.folder, self.said = process, folder, said

    @property
    def message(self) -> str:
        return "".join(self.said)

    def ranks(self) -> list[int]:
        """Process ids by rank, of what still runs."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = entry.read_bytes().split(b"\0")
                state = (entry.parent / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.folder).encode() in words and b"-u" in words and state != "Z":
                rank = [word for word in words if word.startswith(b"--local_rank=")]
                if rank and b"deepspeed.launcher.launch" not in words:
                    found[int(rank[0].split(b"=")[1])] = int(entry.parent.name)
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, what, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.message[-2000:]
            time.sleep(0.1)


@contextmanager
def running(made: Path, folder: Path, *more: object) -> Iterator[Run]:
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", launching.free_port(), "training/train_seq2seq.py",
               "--config", "debug_seq2seq.yaml", "--data.path", made / "tokens", "--image_tokenizer", made / "tokenizer",
               "--text.vocab_size", 300, "--use_layout", "false", "--train.steps", 1000000, "--train.sample_every", 0,
               "--checkpoint.every_steps", 0, "--train.log_every", 1, "--run_dir", folder, *more]
    said: list[str] = []
    with subprocess.Popen(list(map(str, command)), cwd=launching.REPOSITORY, env=launching.environment(), text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
        reader.start()
        run = Run(process, folder, said)
        try:
            run.wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3, 120)
            yield run
        finally:
            for pid in run.ranks():
                os.kill(pid, signal.SIGKILL)
            process.kill()


def checkpoint_of(folder: Path) -> int:
    step = json.loads((folder / "latest.json").read_text())["step"]
    assert (folder / f"checkpoints/step-{step:08d}/MANIFEST.json").is_file()
    return step


@pytest.mark.long
def test_sigterm_to_the_launcher_saves_and_leaves_nothing_running(made, tmp_path):
    with running(made, tmp_path / "run") as run:
        assert len(run.ranks()) == 2
        run.process.send_signal(signal.SIGTERM)
        run.wait_for(lambda: not run.ranks(), 30)
        run.wait_for(lambda: "after a checkpoint" in run.message, 5)
    assert "the launcher is gone; saving a checkpoint" in run.message
    assert checkpoint_of(tmp_path / "run") > 0


@pytest.mark.long
def test_sigterm_to_any_rank_saves_on_all(made, tmp_path):
    with running(made, tmp_path / "run") as run:
        os.kill(run.ranks()[1], signal.SIGTERM)
        run.wait_for(lambda: not run.ranks(), 30)
        assert run.process.wait(30) == 128 + signal.SIGTERM
    assert "stopped by signal 15 after a checkpoint" in run.message
    assert checkpoint_of(tmp_path / "run") > 0


@pytest.mark.long
def test_a_lost_rank_ends_the_run_with_a_reason(made, tmp_path):
    with running(made, tmp_path / "run") as run:
        os.kill(run.ranks()[1], signal.SIGKILL)
        run.wait_for(lambda: not run.ranks(), 40)
        assert run.process.wait(30) != 0
    assert "another process of this run is gone" in run.message
    assert "Traceback" not in run.message


@pytest.mark.long
def test_a_rank_that_stands_still_is_named_and_ends_the_run(made, tmp_path):
    with running(made, tmp_path / "run", "--train.stall_seconds", 3) as run:
        stopped = run.ranks()[1]
        os.kill(stopped, signal.SIGSTOP)
        run.wait_for(lambda: "the run stands still" in run.message, 30)
        run.wait_for(lambda: run.ranks() in ([], [stopped]), 10)
    assert re.search(r"no step was finished for \d+ s \(train.stall_seconds 3\): rank 0 after step \d+ at training/\S+ "
                     r"\(\w+\), rank 1 does not answer; stacks are in", run.message), run.message[-2000:]
    assert "train_seq2seq" in (tmp_path / "run/incidents/rank0.stacks.txt").read_text()


# ---- the parts ----

def proc_of(tree: dict[int, tuple[int, str]], folder: Path) -> Path:
    """A /proc of processes {id: (parent, command line)}."""
    for process, (parent, command) in tree.items():
        (folder / str(process)).mkdir(parents=True, exist_ok=True)
        (folder / str(process) / "stat").write_text(f"{process} (a (name) b) S {parent} 1 1 0")
        (folder / str(process) / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    return folder


@pytest.mark.parametrize(("command", "expected"), [("python -m deepspeed.launcher.launch x.py", True), ("bash", False)])
def test_a_launchers_own_parent_counts_for_deepspeed_alone(tmp_path, monkeypatch, command, expected):
    monkeypatch.setattr(os, "getppid", lambda: 20)
    launcher = Launcher(proc_of({20: (10, command), 10: (1, "deepspeed")}, tmp_path))
    monkeypatch.setattr("training.engine.stopping.LOOK_SECONDS", 0.0)
    assert not launcher.gone()
    proc_of({20: (1, command)}, tmp_path)
    assert launcher.gone() is expected
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launcher.gone()


def test_the_launchers_signal_right_behind_ctrl_c_asks_the_same(monkeypatch):
    flag, clock = StopFlag(), iter([100.0, 100.2, 100.3])

    def now() -> float:
        at = next(clock)
        if at == 100.0:  # Python runs the second handler inside the first
            flag.note(signal.SIGTERM, None)
        return at

    raised: list[int] = []
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr(stopping.signal, "raise_signal", raised.append)
    flag.note(signal.SIGINT, None)
    assert flag.signal and not raised


@pytest.mark.long
def test_the_watchdog_is_silent_while_steps_follow_and_while_a_run_saves(tmp_path, caplog):
    dog = Watchdog(tmp_path, ONE, 0.3)
    with dog.watching():
        for step in range(5):
            time.sleep(0.1)
            dog.beat(step)
        with dog.paused():
            time.sleep(0.6)
    assert caplog.messages == []
    assert list((tmp_path / "incidents").iterdir()) == []


@pytest.mark.long
def test_a_step_that_takes_too_long_is_said_once_with_its_place_and_its_stack(tmp_path, caplog):
    dog = Watchdog(tmp_path, ONE, 0.4)
    with dog.watching():
        dog.beat(7)
        time.sleep(0.65)
        dog.beat(8)
    assert len(caplog.messages) == 1
    assert "rank 0 after step 7 at " in caplog.messages[0]
    assert "test_a_step_that_takes_too_long" in (tmp_path / "incidents/rank0.stacks.txt").read_text()


def test_no_seconds_no_watchdog(tmp_path):
    with Watchdog(tmp_path, ONE, 0.0).watching():
        pass
    assert not (tmp_path / "incidents").exists()


def test_the_place_is_the_innermost_in_our_own_packages():
    seen = []
    time_module = threading.Thread(target=lambda: seen.append(_place(None)))
    time_module.start()
    time_module.join()
    assert seen == ["nowhere"]
