"""`python -m benchmarks training`: the loops do the same work, and what the document says."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, training
from benchmarks.__main__ import main
from tests import launching


@pytest.mark.slow
def test_quick_run_ends_with_one_document():
    result = launching.python("-m", "benchmarks", "training", "--quick", "--threads", 1, "--repeats", 1, "--stages", "1")
    assert result.returncode == 0, result.stderr[-2000:]
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["ok"]
    plain, peer = document["verification"]
    assert (plain["loop"], plain["steps"]) == ("plain", 6)
    assert plain["largest_relative_gap"] < 1e-5
    assert (peer["loop"], peer["steps"]) == ("x-transformers", 1)
    assert [row["loop"] for row in document["results"]] == ["ours", "plain", "x-transformers"]
    assert all(row["tokens_per_s"] == pytest.approx(4 * 64 / row["step_s"], rel=0.01) for row in document["results"])
    seconds = {row["loop"]: row["step_s"] for row in document["results"]}
    assert document["overhead_over_plain"] == pytest.approx(seconds["ours"] / seconds["plain"] - 1, abs=1e-3)
    (stage,) = document["stages"]
    assert stage["zero_stage"] == 1
    assert stage["peak_memory_mib"] > 5


def test_loops_that_differ_are_not_timed(monkeypatch):
    runs = {"ours": training.Run([1.0, 2.0], [1.0]), "plain": training.Run([1.0, 2.1], [1.0])}
    assert not training._verdict("plain", runs["plain"], runs["ours"])["ok"]
    assert training._verdict("x-transformers", runs["plain"], runs["ours"])["ok"]  # the first step alone


def test_the_peak_on_cuda_is_that_of_all_lines_of_a_log(monkeypatch):
    """A log line starts the count anew; the largest part is the peak of the case."""
    now = {"used": 100, "peak": 100}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: now["used"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: now["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: now.update(peak=now["used"]))

    def case() -> None:
        for peak in (150, 900, 200):
            now["peak"] = peak
            torch.cuda.reset_peak_memory_stats()

    assert harness._cuda_peak(case) == 800
    assert harness._cuda_peak(lambda: now.update(peak=130)) == 30


@pytest.mark.parametrize(("arguments", "words"), [
    (["--width", "65"], "multiple of 64"), (["--steps", "2"], "--steps 2 must be at least 3"),
    (["--stages", "0,4"], "expected ZeRO stages from 0 to 3"), (["--threads", "0"], "--threads 0 must be at least 1")])
def test_mistakes_are_one_line(capsys, arguments, words):
    assert main(["training", "--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
