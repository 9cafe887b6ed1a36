"""`tokenloom runs` and `tokenloom report`: what a run folder tells, in a table and on a page."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tokenloom import main
from tokenloom_common.errors import UserError
from training.runs.facts import find_runs, read_run
from training.runs.page import duration, page


def make_run(folder: Path, steps: int = 40, done: int = 40, loss: float = 3.0, **config) -> Path:
    """A run folder as the scripts leave it, with a line every second step."""
    (folder / "samples").mkdir(parents=True)
    values = {"run_dir": str(folder), "image_tokenizer": "t", "model": {"kind": "encoder_decoder"},
              "data": {"path": "<tokens>"}, "train": {"steps": steps}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    rows = [{"step": step, "loss": loss + 1 / step, "lr": 0.1, "samples_per_s": 7.0, "grad_norm": 1.0,
             "skipped_steps": step // 30, "data_wait": 0.01, "elapsed_s": float(step)} for step in range(2, done + 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"python": "3.11", "packages": {"torch": "2"}, "argv": ["train.py", "--a", "b"]}
    (folder / "env.json").write_text(json.dumps(environment))
    (folder / "latest.json").write_text(json.dumps({"step": done, "checkpoint": f"checkpoints/step-{done:08d}"}))
    if done == steps:
        (folder / "model").mkdir()
        (folder / "validation.json").write_text(json.dumps({"loss": loss + 0.5}))
    hour_ago = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (hour_ago, hour_ago))
    return folder


def test_runs_below_a_folder_are_compared_by_any_column(tmp_path, capsys):
    make_run(tmp_path / "b/deep", loss=2.0)
    make_run(tmp_path / "a", done=20, loss=5.0)
    make_run(tmp_path / "b/deep/before-1", loss=9.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("a: 1")
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["run", "kind", "status", "steps", "loss", "held-out", "samples/s", "skipped", "time"]
    assert lines[1] == ["a", "seq2seq", "encoder_decoder", "stopped", "20/40", "5.05", "-", "7", "0", "20", "s"]
    assert lines[2][:7] == ["b/deep", "seq2seq", "encoder_decoder", "done", "40/40", "2.026", "2.5"]
    assert len(lines) == 3
    assert main(["runs", str(tmp_path), "--sort", "held-out", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in document["runs"]] == ["b/deep", "a"]
    assert document["runs"][0]["skipped"] == 1


def add_lines(folder: Path, *rows: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def measured_run(folder: Path) -> Path:
    """A run that also knows speed, memory and, at its end, the held-out split."""
    make_run(folder)
    add_lines(folder, {"step": 40, "tokens_per_s": 12345.6, "mfu": 0.412, "memory_bytes": 3 << 29},
              {"step": 40, "tokens_per_s": 99999.9, "mfu": 0.5, "memory_bytes": 1 << 30},
              {"step": 40, "tokens_per_s": 12345.6, "mfu": 0.412, "memory_bytes": 1 << 30},
              {"step": 10, "validation_loss": 3.5}, {"step": 20, "validation_loss": 2.5}, {"step": 30, "validation_loss": None},
              {"step": 40, "validation_loss": 2.75})
    return folder


def test_runs_that_know_more_have_more_columns(tmp_path, capsys):
    make_run(tmp_path / "a")
    measured_run(tmp_path / "b")
    tokenizer = make_run(tmp_path / "c", codebook={})
    add_lines(tokenizer, {"step": 20, "validation_psnr": 21.5}, {"step": 40, "validation_psnr": 20.5})
    assert main(["runs", str(tmp_path)]) == 0
    header, *lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    table = [dict(zip(header, line, strict=True)) for line in lines]
    assert header == ["run", "kind", "status", "steps", "loss", "held-out", "best", "samples/s", "tokens/s", "MFU", "memory",
                      "skipped", "time"]
    assert [[line[name] for name in ("best", "tokens/s", "MFU", "memory")] for line in table] == [
        ["-", "-", "-", "-"], ["2.5 @ 20", "12,346", "41.2 %", "1.50 GiB"], ["21.5 @ 20", "-", "-", "-"]]
    assert [line["skipped"] for line in table] == ["1", "1", "1"]  # the last line that says it
    assert main(["runs", str(tmp_path), "--json", "--sort", "best"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["run"], run["best"], run["best of"], run["best step"]) for run in found] == [
        ("b", 2.5, "validation_loss", 20), ("c", 21.5, "validation_psnr", 20), ("a", None, None, None)]
    assert (found[0]["tokens/s"], found[0]["MFU"], found[0]["memory"]) == (12345.6, 0.412, 3 << 29)


@pytest.mark.long
def test_the_page_of_a_run_that_knows_more(tmp_path):
    text = page(read_run(measured_run(tmp_path / "run")))
    for words in ("best on the held-out split</th><td>2.5 (loss), step 20<", "image tokens a second</th><td>12,346<",
                  "model FLOPs utilization</th><td>41.2 %<", "memory</th><td>1.50 GiB<"):
        assert words in text, words
    assert text.count("<svg") == 5 + 4
    panels = re.findall(r"<!-- (.*?) -->", text)
    assert {"held-out loss", "image tokens a second", "model FLOPs utilization", "memory, bytes"} <= set(panels)


def test_one_run_folder_is_a_table_of_one_line(tmp_path, capsys):
    make_run(tmp_path / "mine")
    assert main(["runs", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("mine ")


def test_a_run_that_writes_lines_is_running(tmp_path):
    folder = make_run(tmp_path / "run", done=20)
    assert read_run(folder).status == "stopped"
    os.utime(folder / "metrics.jsonl")
    assert read_run(folder).status == "running"


def test_time_and_starts_are_counted_over_stops(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [{"step": step, "loss": 1.0, "elapsed_s": seconds} for step, seconds in ((1, 10.0), (2, 20.0), (3, 5.0), (4, 9.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    run = read_run(folder)
    assert (run.seconds, run.steps, run.incidents) == (29.0, 4, ["started again 1 times after a stop"])


@pytest.mark.long
def test_a_page_holds_everything_and_needs_nothing_else(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    for step in range(1, 7):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(folder / f"samples/step-{step:08d}.png")
    Image.new("RGB", (4, 4)).save(folder / "samples/step-00000006 copy.png")  # a user's, no grid
    (folder / "samples/captions.json").write_text('["<script>alert(1)</script>"]')
    (folder / "incidents").mkdir()
    (folder / "incidents/rank1.stacks.txt").write_text("stack")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<svg") == 5  # loss, lr, gradient norm, samples, data wait
    assert text.count("data:image/png;base64,") == 4  # the last ones
    assert "step-00000006.png" in text
    assert "step-00000002.png" not in text
    for words in ("done, step 40 of 40", "1 steps were skipped", "rank1.stacks.txt: where a rank stood still", "&lt;tokens&gt;",
                  "train.py --a b", "checkpoints/step-00000040", "40 s"):
        assert words in text, words
    outside = set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text))
    assert outside == set()


def test_a_page_of_a_run_that_has_only_begun(tmp_path):
    folder = make_run(tmp_path / "run", done=0)
    (folder / "env.json").unlink()
    text = page(read_run(folder))
    assert "nothing was logged yet" in text
    assert "none yet" in text


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"a page with curves needs matplotlib.* pip install 'tokenloom\[train\]'"):
        page(read_run(make_run(tmp_path / "run")))


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (61, "1 min 1 s"), (4000, "1 h 6 min"), (90000, "25 h 0 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("command", "make", "words"), [
    (["runs", "{}/nowhere"], None, "nowhere: no such folder"), (["runs", "{}"], None, "no run folder at or below it"),
    (["report", "{}"], None, "is no run folder"), (["report", "{}/nowhere"], None, "no such folder"),
    (["report", "{}/run", "--out", "{}"], "run", "is a folder; give a file"),
    (["report", "{}/run", "--out", "{}/run/env.json/where.html"], "run", "env.json is a file"),
    (["report", "{}/run", "--out", ""], "run", "--out is empty"),
    (["runs", "{}", "--sort", "luck"], "run", "invalid choice")])
def test_mistakes_are_one_line(tmp_path, capsys, command, make, words):
    if make:
        make_run(tmp_path / make)
    assert main([word.format(tmp_path) for word in command]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_every_run_is_found_once(tmp_path):
    make_run(tmp_path / "x")
    make_run(tmp_path / "x/inside")
    assert [run.path.name for run in find_runs(tmp_path)] == ["x"]
