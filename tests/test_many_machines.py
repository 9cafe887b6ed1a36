"""Several machines, played on the loopback: one launcher a machine, as `deepspeed --no_ssh` and torchrun start them. They train
as one machine would, refuse what differs between them, and end together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import launching, tiny
from training.data.builders.shapes import build_shapes
from training.runs.metrics import read_metrics

pytestmark = pytest.mark.slow
ENCODE = launching.REPOSITORY / "training/encode_dataset.py"
SCRIPT = launching.REPOSITORY / "training/train_seq2seq.py"
HOSTS = ("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, rows=40)
    return folder


@pytest.fixture(scope="module")
def one_machine(made, tmp_path_factory) -> list[str]:
    """Losses of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one")
    result = launching.deepspeed(2, str(SCRIPT), *arguments(made, folder / "run"))
    assert result.returncode == 0, result.stderr[-2000:]
    return losses(folder / "run")


def arguments(made: Path, run_dir: object, *more: object) -> list[object]:
    return ["--config", "debug_seq2seq.yaml", "--data.path", made / "tokens", "--image_tokenizer", made / "tokenizer",
            "--text.vocab_size", 300, "--use_layout", "false", "--train.steps", 8, "--train.batch_size", 8,
            "--train.log_every", 1, "--train.sample_every", 0, "--model.dropout", 0.1, "--run_dir", run_dir, *more]


def losses(run_dir: Path) -> list[str]:
    return [row["loss"].hex() for row in read_metrics(run_dir / "metrics.jsonl")]


class Machine:
    """One launcher and what it started."""

    def __init__(self, command: list[object], folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.said = folder / "said.txt"
        environment = {**launching.environment(), "PYTHONPATH": str(launching.REPOSITORY)}
        with self.said.open("w") as file:
            self.process = subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, stdout=file, stderr=file,
                                            start_new_session=True)

    def running(self) -> list[int]:
        """Ids of what runs in its session."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(entry.parent.name))
        return found

    def ended(self, seconds: float = 90) -> int:
        """Its exit code, once nothing of it runs."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.running():
            assert time.monotonic() < deadline, self.said.read_text()[-3000:]
            time.sleep(0.1)
        return self.process.returncode


@contextmanager
def machines(commands: list[list[object]], folder: Path) -> Iterator[list[Machine]]:
    """Each in a working folder of its own, FOLDER/machineN; nothing is left of them at the end."""
    started = [Machine(command, folder / f"machine{number}") for number, command in enumerate(commands)]
    try:
        yield started
    finally:
        for machine in started:
            for process in machine.running():
                os.kill(process, signal.SIGKILL)
            machine.process.wait()


def deepspeed(folder: Path, script_arguments: list[list[object]], slots: int = 1, script: Path = SCRIPT) -> list[list[object]]:
    """What each machine's `deepspeed --no_ssh` is called with."""
    hostfile, port = folder / "hostfile", launching.free_port()
    hostfile.write_text("".join(f"{host} slots={slots}\n" for host in HOSTS))
    return [["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", number, "--master_addr", "127.0.0.1",
             "--master_port", port, script, *own] for number, own in enumerate(script_arguments)]


def torchrun(script_arguments: list[list[object]]) -> list[list[object]]:
    port = launching.free_port()
    return [["torchrun", "--nnodes", 2, "--node_rank", number, "--nproc_per_node", 1, "--master_addr", "127.0.0.1",
             "--master_port", port, SCRIPT, *own] for number, own in enumerate(script_arguments)]


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_machines_train_as_one_to_the_bit(made, one_machine, tmp_path, launcher):
    both = [arguments(made, tmp_path / "run")] * 2
    with machines(deepspeed(tmp_path, both) if launcher == "deepspeed" else torchrun(both), tmp_path) as started:
        assert [machine.ended() for machine in started] == [0, 0], started[0].said.read_text()[-2000:]
    assert losses(tmp_path / "run") == one_machine
    assert (tmp_path / "run/model/model_index.json").is_file()


def test_two_machines_with_two_processes_each_see_the_same_data(made, one_machine, tmp_path):
    """Without dropout, which each process draws for itself, four processes give two's losses but for the order of sums."""
    rows = []
    for slots in (1, 2):
        folder = tmp_path / str(slots)
        folder.mkdir()
        commands = deepspeed(folder, [arguments(made, folder / "run", "--model.dropout", 0.0)] * 2, slots)
        with machines(commands, folder) as started:
            assert [machine.ended() for machine in started] == [0, 0], started[0].said.read_text()[-2000:]
        rows.append([row["loss"] for row in read_metrics(folder / "run/metrics.jsonl")])
    assert len(rows[0]) == 8
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)


def test_a_run_folder_that_is_not_shared_is_refused_by_all(made, tmp_path):
    """The same relative path in two working folders stands for two machines' own disks."""
    with machines(deepspeed(tmp_path, [arguments(made, "run")] * 2), tmp_path) as started:
        assert [machine.ended() for machine in started] == [2, 2]
    message = started[0].said.read_text()
    assert re.search(r"--run_dir run: rank 1 \(\S+\) does not see what rank 0 \(\S+\) writes there; give a folder", message)
    assert "Traceback" not in message + started[1].said.read_text()
    assert [[path.name for path in (tmp_path / f"machine{number}").iterdir()] for number in range(2)] == [["said.txt"]] * 2


def test_token_shards_that_are_not_written_in_one_place_are_refused_by_all(made, tmp_path):
    build_shapes(tmp_path / "pictures", size=16, num_scenes=12, seed=0)
    both = [["--image_tokenizer", made / "tokenizer", "--data.path", tmp_path / "pictures", "--out", "tokens"]] * 2
    with machines(deepspeed(tmp_path, both, script=ENCODE), tmp_path) as started:
        assert [machine.ended() for machine in started] == [2, 2]
    assert re.search(r"error: --out tokens: rank 1 \(\S+\) does not see what", started[0].said.read_text())
    assert [[path.name for path in (tmp_path / f"machine{number}").iterdir()] for number in range(2)] == [["said.txt"]] * 2


def test_another_command_on_one_machine_is_refused_by_all(made, tmp_path):
    other = arguments(made, tmp_path / "run", "--optim.lr", 0.1)
    with machines(deepspeed(tmp_path, [arguments(made, tmp_path / "run"), other]), tmp_path) as started:
        assert [machine.ended() for machine in started] == [2, 2]
    assert "): optim.lr 0.003 and 0.1; start the same command" in started[0].said.read_text()
    assert not (tmp_path / "run").exists()


def test_data_that_one_machine_lacks_ends_all_with_its_path(made, tmp_path):
    """One machine has the tokens under the relative path that both were given, the other does not."""
    (tmp_path / "machine0").mkdir()
    (tmp_path / "machine0/tokens").symlink_to(made / "tokens")
    both = [arguments(made, tmp_path / "run", "--data.path", "tokens")] * 2
    with machines(deepspeed(tmp_path, both), tmp_path) as started:
        assert [machine.ended() for machine in started] == [2, 2]
    assert "error: tokens: no such folder of token shards" in started[0].said.read_text()
    assert "Traceback" not in started[0].said.read_text() + started[1].said.read_text()


def test_a_machine_that_dies_ends_the_others_with_a_reason(made, tmp_path):
    with machines(deepspeed(tmp_path, [arguments(made, tmp_path / "run", "--train.steps", 10**6)] * 2), tmp_path) as started:
        wait_for_steps(tmp_path / "run", 3)
        for process in started[1].running():
            os.kill(process, signal.SIGKILL)
        assert started[0].ended(40) == 1
    message = started[0].said.read_text()
    assert "error: another process of this run is gone" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_to_one_machines_launcher_saves_and_ends_all(made, tmp_path, launcher):
    """`deepspeed` dies of the signal at once, and its ranks save and end; torchrun passes it on and waits, and ends with 1."""
    both = [arguments(made, tmp_path / "run", "--train.steps", 10**6, "--checkpoint.every_steps", 0)] * 2
    with machines(deepspeed(tmp_path, both) if launcher == "deepspeed" else torchrun(both), tmp_path) as started:
        wait_for_steps(tmp_path / "run", 3)
        os.kill(started[1].process.pid, signal.SIGTERM)
        codes = [machine.ended(60) for machine in started]
    assert codes == ([143, -signal.SIGTERM] if launcher == "deepspeed" else [1, 1])
    assert "stopped by signal 15 after a checkpoint" in started[0].said.read_text()
    assert len(list((tmp_path / "run/checkpoints").glob("step-*/MANIFEST.json"))) == 1


def test_a_machine_that_waits_for_the_others_says_so(made, tmp_path):
    with machines(deepspeed(tmp_path, [arguments(made, tmp_path / "run")]), tmp_path) as started:
        deadline = time.monotonic() + 120
        while "waits at 127.0.0.1:" not in (said := started[0].said.read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
    assert re.search(r"rank 0 waits at 127\.0\.0\.1:\d+ until all 2 processes of the run are there", said)
