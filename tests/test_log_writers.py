"""TensorBoard and W&B are told what metrics.jsonl has, over a stop too; a place that fails ends no training."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from tests import tiny
from tokenloom_common.config import merge
from tokenloom_common.errors import UserError
from training import train_seq2seq
from training.config.run import LogConfig, RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.engine.processes import Processes
from training.loop import script
from training.loop.log import RunLog, in_short
from training.loop.loop import run_training
from training.loop.writers import (
    GROUPS,
    WRITERS,
    TensorBoardWriter,
    check_writers,
    grouped,
    open_writers,
)
from training.runs.metrics import read_metrics, sample_path
from training.train_seq2seq import Seq2SeqTraining


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder)
    return folder


def config(made: Path, run_dir: Path, **changes: Any) -> Seq2SeqRunConfig:
    base = {"data": {"path": str(made / "tokens"), "validation_split": "held_out"}, "image_tokenizer": str(made / "tokenizer"),
            "run_dir": str(run_dir), "use_layout": False, "text": {"vocab_size": 300, "text_length": 12},
            "model": {"preset": "debug", "width": 32, "heads": 2, "head_dim": 16, "encoder_layers": 1, "decoder_layers": 1},
            "train": {"steps": 5, "batch_size": 4, "precision": "float32", "log_every": 1, "sample_every": 2,
                      "validate_every": 2},
            "optim": {"lr": 0.003, "warmup_steps": 0, "schedule": "constant"}, "checkpoint": {"every_steps": 2}}
    return Seq2SeqRunConfig.parse(merge(base, changes), "test")


def train(run: Seq2SeqRunConfig, group: Processes) -> None:
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, group, training.run_state)


def stopped_and_gone_on(made: Path, run_dir: Path, group: Processes, kind: dict[str, Any]) -> None:
    """Five steps, of which a kill after the third made the third come again."""
    train(config(made, run_dir, log=kind, train={"steps": 3}), group)
    shutil.rmtree(run_dir / "checkpoints/step-00000003")
    train(config(made, run_dir, log=kind), group)


def logged(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """name -> (step, number) of every line of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "elapsed_s"):
                found.setdefault(name, []).append((row["step"], value))
    return found


# ---- TensorBoard ----

def test_tensorboard_has_the_numbers_and_grids_of_a_stopped_and_resumed_run_once(made, tmp_path, group):
    stopped_and_gone_on(made, tmp_path, group, {"tensorboard": True})
    first, _ = sorted((tmp_path / "tensorboard").iterdir())
    first.write_bytes(first.read_bytes() + b"half a record")  # as a kill leaves it
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    expected = logged(tmp_path)
    assert {"loss", "lr", "tokens_per_s", "data_wait", "memory_bytes", "validation_loss"} <= expected.keys()
    assert [step for step, _ in expected["loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in expected["validation_loss"]] == [2, 4, 5]
    assert set(events.Tags()["scalars"]) == {grouped(name) for name in expected}
    for name, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(grouped(name))]
        assert found == [(step, float(numpy.float32(value))) for step, value in points], name
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [2, 4, 5]
    for grid in grids:
        with Image.open(sample_path(tmp_path, grid.step)) as drawn, Image.open(io.BytesIO(grid.encoded_image_string)) as sent:
            assert numpy.array_equal(numpy.asarray(drawn.convert("RGB")), numpy.asarray(sent))


def test_what_was_logged_is_in_the_file_at_once(tmp_path, monkeypatch):
    """A killed run goes on from its last checkpoint: what it had logged before that is not logged again. A slow disk."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: time.sleep(0.02) or write(self, data))
    writer = TensorBoardWriter(RunConfig.parse({"run_dir": str(tmp_path)}, "test"), 0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "grid.png")
    writer.metrics(7, {f"term{number}": 0.5 for number in range(8)})
    sizes = [file.stat().st_size]
    writer.image(7, "samples", tmp_path / "grid.png")
    sizes.append(file.stat().st_size)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["scalars"]) == 8
    (grid,) = events.Images("samples")
    assert (grid.step, grid.width, grid.height) == (7, 300, 200)
    assert file.stat().st_size == sizes[1]
    assert sizes[1] - sizes[0] == pytest.approx(len(grid.encoded_image_string), abs=100)


def test_without_the_key_nothing_is_written_for_tensorboard_or_wandb(made, tmp_path, group):
    train(config(made, tmp_path, train={"steps": 1, "sample_every": 0, "validate_every": 0}), group)
    assert not {"tensorboard", "wandb", "wandb-id"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("name", "tag"), [
    ("loss", "loss/loss"), ("weighted.l1", "loss/weighted.l1"), ("lr", "optim/lr"),
    ("discriminator.lr", "optim/discriminator.lr"),
    ("discriminator.grad_norm", "optim/discriminator.grad_norm"), ("tokens_per_s", "speed/tokens_per_s"),
    ("validation_loss", "validation/validation_loss"), ("codebook_usage", "codebook/codebook_usage")])
def test_numbers_are_shown_in_folders(name, tag):
    assert grouped(name) == tag


def test_no_number_is_in_two_folders():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))


def test_a_run_that_starts_over_leaves_its_curves_behind(made, tmp_path, group):
    run = {"log": {"tensorboard": True}, "train": {"steps": 1, "sample_every": 0, "validate_every": 0}}
    train(config(made, tmp_path, **run), group)
    train(config(made, tmp_path, **run, checkpoint={"resume": "never", "every_steps": 0}), group)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "before-1/tensorboard").iterdir())) == 1


# ---- Weights & Biases ----

class Wandb(ModuleType):
    """W&B's module as far as WandbWriter uses it: parameters as in wandb 0.31.0, read in its source (`init` in
    sdk/wandb_init.py; `log`, `finish`, `starting_step` of the Run in sdk/wandb_run.py; Image in sdk/data_types/image.py). The
    writer was also run by hand against that release, offline. The package itself, 60 MB, is not installed for the tests."""

    def __init__(self, server_has: int = 0) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self._server_has = server_has

    def init(self, project: str | None = None, dir: str | None = None, id: str | None = None, name: str | None = None,
             config: dict[str, Any] | None = None, mode: str | None = None, resume: str | None = None) -> Any:
        self.started.append({"project": project, "dir": dir, "id": id, "name": name, "config": config, "mode": mode,
                             "resume": resume})
        return SimpleNamespace(log=self._log, finish=self._finish, starting_step=self._server_has if resume else 0)

    def _log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        assert not self.rows or step >= self.rows[-1][0], "W&B drops a step that is smaller than the last"
        self.rows.append((step, data))

    def _finish(self) -> None:
        self.finished += 1

    class Image:
        def __init__(self, path: str) -> None:
            self.path = path


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def told(rows: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, str, float]]:
    """Every number; a grid as the step of its file."""
    return [(step, name, int(Path(value.path).stem.removeprefix("step-")) if isinstance(value, Wandb.Image) else value)
            for step, data in rows for name, value in data.items()]


def test_wandb_is_told_everything_offline_and_a_resumed_part_is_whole_by_itself(made, tmp_path, group, wandb):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    train(config(made, run_dir, log={"wandb": True}, train={"steps": 3}), group)
    first = told(wandb.rows)
    wandb.rows.clear()
    shutil.rmtree(run_dir / "checkpoints/step-00000003")
    train(config(made, run_dir, log={"wandb": True}), group)
    one, two = wandb.started
    assert one["id"] == two["id"] == (run_dir / "wandb-id").read_text()
    assert (one["project"], one["name"], one["dir"]) == ("tokenloom", "run", str(run_dir))
    assert (one["mode"], one["resume"]) == ("offline", None)
    assert one["config"]["train"]["batch_size"] == 4
    expected = {(step, grouped(name), value) for name, points in logged(run_dir).items() for step, value in points}
    expected |= {(step, "samples", step) for step in (2, 4, 5)}
    assert len(told(wandb.rows)) == len(expected)
    assert set(told(wandb.rows)) == expected
    assert {step for step, *_ in first} == {1, 2, 3}
    assert wandb.finished == 2


def test_wandb_online_goes_on_behind_what_the_server_has(tmp_path, wandb, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    log = {"wandb": True, "wandb_mode": "online", "wandb_project": "mine"}
    run = RunConfig.parse({"run_dir": str(tmp_path), "log": log}, "test")
    monkeypatch.setattr(wandb, "_server_has", 4)
    writer = open_writers(run, first_step=2)["wandb"]
    for step in (3, 4, 5):
        writer.metrics(step, {"loss": step / 2})
    assert wandb.rows == [(4, {"loss/loss": 2.0}), (5, {"loss/loss": 2.5})]
    assert (wandb.started[0]["mode"], wandb.started[0]["project"], wandb.started[0]["resume"]) == ("online", "mine", "allow")


def test_wandbs_own_variables_hold(tmp_path, wandb, monkeypatch):
    for name, value in (("WANDB_MODE", "online"), ("WANDB_PROJECT", "theirs"), ("WANDB_NAME", "named")):
        monkeypatch.setenv(name, value)
    open_writers(RunConfig.parse({"run_dir": str(tmp_path), "log": {"wandb": True}}, "test"), 0)
    assert (wandb.started[0]["mode"], wandb.started[0]["project"], wandb.started[0]["name"]) == ("online", None, None)
    open_writers(RunConfig.parse({"run_dir": str(tmp_path), "log": {"wandb": True, "wandb_mode": "offline"}}, "test"), 0)
    assert wandb.started[1]["mode"] == "offline"


def test_a_wandb_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
    def fail(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", fail)
    words = r"log\.wandb: W&B cannot start: RuntimeError: api_key not configured \(no-tty\)\. call"
    with pytest.raises(UserError, match=words) as caught:
        open_writers(RunConfig.parse({"run_dir": str(tmp_path), "log": {"wandb": True}}, "test"), 0)
    assert "\n" not in str(caught.value)


# ---- any of them ----

def test_every_place_has_a_key_and_is_asked_for_by_it():
    assert set(WRITERS) == {name for name, field in LogConfig.model_fields.items() if field.annotation is bool}
    for name, kind in WRITERS.items():
        assert kind.is_wanted(LogConfig(**{name: True}))
        assert not kind.is_wanted(LogConfig())


@pytest.mark.parametrize(("name", "module", "extra"), [
    ("tensorboard", "torch.utils.tensorboard", "log"), ("wandb", "wandb", "wandb")])
def test_a_missing_package_names_its_extra_before_anything_is_written(tmp_path, group, monkeypatch, capsys, name, module,
                                                                      extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(script, "processes", lambda threads: nullcontext(group))
    monkeypatch.setattr(script, "setup_console", lambda is_first: None)
    assert train_seq2seq.main(["--data.path", "d", "--image_tokenizer", "t", "--run_dir", str(tmp_path / "run"),
                               f"--log.{name}", "true"]) == 2
    message = capsys.readouterr().err
    assert f"log.{name} needs {module} (" in message
    assert f"pip install 'tokenloom[{extra}]'" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    check_writers(LogConfig())


@pytest.mark.parametrize("key", ["wandb_project", "wandb_mode"])
def test_keys_of_wandb_need_wandb(key):
    with pytest.raises(UserError, match=rf"log\.{key} is for log\.wandb, which is off"):
        LogConfig.parse({key: "offline"}, "test")


class Kept:
    """A place that keeps what it is told; it breaks at a step."""

    def __init__(self, breaks_at: int = 0) -> None:
        self.told: list[Any] = []
        self._breaks_at = breaks_at

    def metrics(self, step: int, values: Any) -> None:
        if step == self._breaks_at:
            raise ConnectionError("no route to host")
        self.told.append((step, dict(values)))

    def image(self, step: int, name: str, path: Path) -> None:
        self.told.append((step, name, path))

    def close(self) -> None:
        self.told.append("closed")


def test_a_place_that_fails_is_left_out_and_the_rest_goes_on(tmp_path, caplog):
    broken, whole = Kept(breaks_at=2), Kept()
    log = RunLog(tmp_path, True, "test", 3, 0, {"broken": broken, "whole": whole})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.metrics(step, {"loss": 1.0})
        log.close()
    assert broken.told == [(1, {"loss": 1.0})]
    assert whole.told == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (3, {"loss": 1.0}), "closed"]
    assert caplog.messages == ["log.broken failed and is left out from here on (ConnectionError: no route to host); "
                               "metrics.jsonl goes on"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_places_are_told_of_finite_numbers_and_of_grids_that_are_there(tmp_path):
    place = Kept()
    log = RunLog(tmp_path, True, "test", 3, 0, {"kept": place})
    log.metrics(1, {"loss": float("nan"), "lr": 0.5, "grad_norm": float("inf")})
    log.sampled(1)
    sample_path(tmp_path, 2).parent.mkdir()
    sample_path(tmp_path, 2).write_bytes(b"")
    log.sampled(2)
    assert place.told == [(1, {"lr": 0.5}), (2, "samples", sample_path(tmp_path, 2))]


def test_only_the_first_process_opens_places(made, tmp_path, group, monkeypatch):
    class Second(Processes):
        def first_does(self, action: Any) -> Any:
            return None

    opened = []
    monkeypatch.setattr("training.loop.loop.open_writers", lambda *_: opened.append(1) or {})
    run = config(made, tmp_path, train={"steps": 1, "sample_every": 0, "validate_every": 0})
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, Second(1, 1, 0, group.device), training.run_state)
    assert opened == []
    assert not (tmp_path / "metrics.jsonl").exists()
    again = Seq2SeqTraining(config(made, tmp_path / "first", train={"steps": 1, "sample_every": 0, "validate_every": 0}), group)
    run_training(again.task(), again.config, group, again.run_state)
    assert opened == [1]


def test_the_progress_bar_says_what_there_is():
    line = {"loss": 4.312, "lr": 3e-4, "samples_per_s": 12.34, "data_wait": 0.021, "memory_bytes": 3 << 29, "grad_norm": 1.0}
    assert in_short(line) == "loss 4.31, lr 0.0003, 12.3 samples/s, data wait 2%, 1.50 GiB"
    assert in_short(line | {"tokens_per_s": 12345.6, "mfu": 0.412, "validation_loss": 3.21}) == (
        "loss 4.31, held-out 3.21, lr 0.0003, 12,346 tokens/s, MFU 41.2%, data wait 2%, 1.50 GiB")


def test_the_bar_keeps_the_held_out_loss_until_there_is_another(tmp_path):
    log = RunLog(tmp_path, True, "test", 3, 0)
    log.metrics(1, {"loss": 2.0})
    log.metrics(1, {"validation_loss": 3.0})
    log.metrics(2, {"loss": 1.0})
    assert log._bar.postfix == "loss 1, held-out 3"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["validation_loss" in row for row in rows] == [False, True, False]
