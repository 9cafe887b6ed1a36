"""What the processes of a run must have alike is compared before anything is trained; all of them refuse, in the same words."""

from __future__ import annotations

import platform
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tokenloom_common.errors import MissingFileError, RunFailedError, UserError
from training.engine import agreement
from training.engine import processes as process_group
from training.engine.agreement import check_same, check_shared
from training.engine.processes import Processes, meeting, peers_may_go

RANKS = 3


class Together(Processes):
    """Ranks that are threads of one process."""

    def among(self, shared: dict[str, Any]) -> Together:
        object.__setattr__(self, "shared", shared)
        return self

    def gather(self, value: Any) -> list[Any]:
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait(20)
        found = list(self.shared["values"])
        self.shared["barrier"].wait(20)
        return found

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def first_does(self, action: Any) -> Any:
        return self.gather(action() if self.is_first else None)[0]


def on_every_rank(what) -> list[Exception | None]:
    """The error that each rank's `what(group)` raised."""
    shared = {"values": [None] * RANKS, "barrier": threading.Barrier(RANKS)}
    errors: list[Exception | None] = [None] * RANKS

    def rank(number: int) -> None:
        try:
            what(Together(number, RANKS, 0, torch.device("cpu")).among(shared))
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=rank, args=(number,), name=f"node-{number}") for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture(autouse=True)
def machines(monkeypatch):
    """Every rank has a machine of its own."""
    monkeypatch.setattr(platform, "node", lambda: threading.current_thread().name)
    monkeypatch.setattr(agreement, "APPEARS_SECONDS", 0.3)


def test_other_settings_on_one_machine_are_refused_by_key(monkeypatch):
    settings = {"seed": 1, "train": {"steps": 5, "batch_size": 8}, "only": None}

    def same(group):
        check_same(group, settings, "the config")

    def different(group):
        mine = settings if group.rank < 2 else {**settings, "train": {"steps": 6, "batch_size": 8}, "more": "x"}
        check_same(group, mine, "the config")

    assert on_every_rank(same) == [None] * RANKS
    errors = on_every_rank(different)
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]) == ("the config differs between rank 0 (node-0) and rank 2 (node-2): train.steps 5 and 6; more None "
                              "and x; start the same command with the same files on every machine")
    assert all(isinstance(error, UserError) and error.raised_everywhere for error in errors)


def test_one_folder_for_all_is_left_without_a_trace(tmp_path):
    folder = tmp_path / "runs/run"
    assert on_every_rank(lambda group: check_shared(group, folder, f"--run_dir {folder}")) == [None] * RANKS
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_another_one_elsewhere_is_refused_and_nothing_is_left(tmp_path):
    def check(group):
        check_shared(group, tmp_path / f"disk{group.rank > 0}" / "run", "--run_dir run")

    errors = on_every_rank(check)
    assert str(errors[0]).startswith("--run_dir run: rank 1 (node-1), rank 2 (node-2) does not see what rank 0 (node-0) "
                                     "writes there; give a folder that all machines share")
    assert all(isinstance(error, UserError) and error.raised_everywhere for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    later = threading.Timer(0.15, (tmp_path / "late").touch)
    later.start()
    assert agreement._appears(tmp_path / "late")
    later.join()


def test_the_machine_of_an_error_is_named_where_it_is_not_the_first_ones():
    def missing_on(number):
        def check(group):
            group.raise_together(MissingFileError("data: no such folder") if group.rank == number else None)
        return check

    assert [error.raised_on for error in on_every_rank(missing_on(1))] == ["node-1"] * RANKS
    assert not any(hasattr(error, "raised_on") for error in on_every_rank(missing_on(0)))


def test_processes_that_do_not_meet_say_where_they_waited(monkeypatch, caplog):
    for name, value in (("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("WORLD_SIZE", "4"), ("RANK", "2"),
                        ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "SAID_AFTER_SECONDS", 0.0)
    with pytest.raises(RunFailedError, match=r"not all 4 processes of the run came to 10\.0\.0\.1:29500 \(Timed"), meeting():
        while not caplog.messages:
            pass
        raise dist.DistStoreError("Timed out after 9 seconds waiting for clients.\nframe #1")
    assert caplog.messages == ["rank 2 waits at 10.0.0.1:29500 until all 4 processes of the run are there"]
    with pytest.raises(UserError, match=r"port 29500 of this machine is in use.*--master_port"), meeting():
        raise dist.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE")


def test_only_what_a_lost_process_causes_is_said_to_be_one():
    two = Processes(0, 2, 0, torch.device("cpu"))
    with pytest.raises(RunFailedError, match=r"another process .* is gone \(\[gloo/pair\.cc\] Connection"), peers_may_go(two):
        raise RuntimeError("[gloo/pair.cc] Connection closed by peer\nstack")
    for group, error in ((two, RuntimeError("CUDA out of memory")), (two, RunFailedError("gloo")),
                         (Processes(0, 1, 0, torch.device("cpu")), RuntimeError("Connection closed by peer"))):
        with pytest.raises(type(error)) as caught, peers_may_go(group):
            raise error
        assert caught.value is error
