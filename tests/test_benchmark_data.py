"""`python -m benchmarks data`: every reader gives the same rows, and what the document says."""

from __future__ import annotations

import json

import numpy
import pytest

from benchmarks import data
from benchmarks.__main__ import main
from tests.source_files import own_cache  # noqa: F401 (a fixture for all tests here)


@pytest.mark.long
def test_quick_run_ends_with_one_document(capsys, tmp_path):
    out = tmp_path / "data.json"
    assert main(["data", "--quick", "--rows", "300", "--pictures", "12", "--workers", "1", "--out", str(out)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["ok"]
    assert {(row["rows"], row["ok"]) for row in document["verification"]} == {(512, True), (12, True)}
    assert len({row["digest"] for row in document["verification"]}) == 2
    assert [row["reader"] for row in document["tokens"]] == ["ours", "ours, 1 workers", "datasets", "datasets", "webdataset"]
    assert [row["order"] for row in document["pictures"]] == ["shuffled"] * 3 + ["in order"] * 2
    assert all(row["rows_per_s"] > 0 and row["open_s"] >= 0 for row in [*document["tokens"], *document["pictures"]])


def test_ours_alone(capsys):
    assert main(["data", "--quick", "--rows", "256", "--pictures", "8", "--alone"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["reader"].split(",")[0] for row in [*document["tokens"], *document["pictures"]]} == {"ours"}


def test_a_digest_tells_rows_apart_whatever_their_order():
    rows = numpy.arange(12, dtype=numpy.uint16).reshape(3, 4)
    one = data.digest(iter([(rows, ["a", "b", "c"])]))
    assert one == data.digest(iter([(rows[2:], ["c"]), (rows[:2], ["a", "b"])]))
    assert one != data.digest(iter([(rows, ["a", "c", "b"])]))
    assert one != data.digest(iter([(rows[:2], ["a", "b"])]))


def test_readers_that_differ_are_not_timed():
    readers = [data.Reader(name, "in order", lambda: None, lambda _, rows=rows: iter([(numpy.zeros((rows, 2)), ["x"] * rows)]))
               for name, rows in (("ours", 3), ("peer", 2))]
    verdicts, timed = data.measure_readers(readers, 1)
    assert [row["ok"] for row in verdicts] == [True, False]
    assert timed == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["--rows", "0"], "--rows 0 must be at least 1"), (["--workers", "-1"], "--workers -1 must be at least 0"),
    (["--out", "/proc/all.json"], "cannot be written"), (["--threads", "0"], "--threads 0 must be at least 1")])
def test_mistakes_are_one_line(capsys, arguments, words):
    assert main(["data", "--quick", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
