"""`python -m benchmarks serving`: server and loop draw the same images, and what the document says."""

from __future__ import annotations

import json

import pytest

from benchmarks import serving
from benchmarks.__main__ import main


@pytest.mark.long
def test_quick_run_ends_with_one_document(capsys, tmp_path):
    out = tmp_path / "serving.json"
    assert main(["serving", "--quick", "--requests", "3", "--rows", "4", "--threads", "1", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["ok"]
    assert [row["candidate"] for row in document["throughput"]] == ["server", "loop"]
    assert all(row["images_per_s"] > 0 for row in document["throughput"])
    assert [(row["server"], row["requests"]) for row in document["latency"]] == [("queued", 3), ("idle", 4)]
    assert document["first_partial"]["ratio"] > 0
    assert document["ratio"] > 0


def test_percentiles_are_values_that_were_measured():
    assert serving._percentiles([float(value) for value in range(1, 101)]) == {
        "requests": 100, "p50_s": 50.0, "p95_s": 95.0, "p99_s": 99.0}
    assert serving._percentiles([2.0]) == {"requests": 1, "p50_s": 2.0, "p95_s": 2.0, "p99_s": 2.0}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--requests", "0"], "--requests 0 must be at least 1"), (["--requests", "2000"], "--requests 2000 must be at most 1024"),
    (["--rows", "1"], "--rows 1 must be at least 2"), (["--out", "/proc/all.json"], "cannot be written"),
    (["--model", "/nowhere"], "/nowhere")])
def test_mistakes_are_one_line(capsys, arguments, words):
    assert main(["serving", "--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
