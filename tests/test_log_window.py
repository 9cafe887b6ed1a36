"""What a line of the log says of speed, waiting and memory, by hand."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from training.engine.processes import Processes
from training.loop import window as log_window
from training.loop.window import Window, memory

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that shows its only element."""
    now = [100.0]
    monkeypatch.setattr(log_window.time, "perf_counter", lambda: now[0])
    return now


def test_speed_by_hand(clock):
    window = Window(batch_size=8, tokens_per_item=256, peak_share=0.01)
    window.steps, window.data_seconds = 10, 0.5
    clock[0] += 4.0
    assert window.speed() == {"samples_per_s": 20.0, "tokens_per_s": 5120.0, "mfu": pytest.approx(0.2), "data_wait": 0.125}


def test_what_is_not_known_is_left_out(clock):
    window = Window(batch_size=8)
    window.steps = 10
    clock[0] += 4.0
    assert window.speed() == {"samples_per_s": 20.0, "data_wait": 0.0}


def test_work_between_steps_takes_no_time(clock):
    window = Window(batch_size=8)
    window.steps = 10
    clock[0] += 3.0
    with window.apart():
        clock[0] += 1000.0
    clock[0] += 1.0
    assert window.speed()["samples_per_s"] == 20.0


def test_steps_before_a_resume_are_in_the_means_and_not_in_the_speed(clock):
    window = Window(batch_size=8)
    window.add({"loss": torch.tensor(4.0)})
    window.steps = 1
    again = Window(batch_size=8)
    again.restore(window.state())
    again.add({"loss": torch.tensor(2.0)})
    again.steps += 1
    clock[0] += 2.0
    assert again.means(ALONE) == {"loss": 3.0}
    assert again.speed()["samples_per_s"] == 4.0


def test_memory_on_the_cpu_is_what_this_process_holds():
    before = memory(ALONE)["memory_bytes"]
    held = mmap.mmap(-1, 64 << 20)  # fresh pages; torch's may be some that an earlier test has freed
    held.write(b"1" * len(held))
    more = memory(ALONE)["memory_bytes"] - before
    assert len(held) * 0.9 < more < len(held) * 1.5
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    assert memory(ALONE)["memory_bytes"] == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_without_proc_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(log_window, "_resident", lambda: 0)
    assert memory(ALONE) == {}


def test_memory_on_cuda_is_the_peak_since_the_line_before(monkeypatch):
    peak = [7 << 30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 1 << 30))
    gpu = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cuda", 0))
    assert [memory(gpu), memory(gpu)] == [{"memory_bytes": 7 << 30}, {"memory_bytes": 1 << 30}]
