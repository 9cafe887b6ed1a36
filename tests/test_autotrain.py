"""`tokenloom train` around its choices: refusals, the scripts' keys, time."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from seq2seq import TextTokenizer
from tests import command_line, tiny
from tests.test_autotrain_choices import EMOJI, TWO_CORES, chosen
from tokenizer_image import load_tokenizer
from tokenloom_common.errors import MissingFileError, UserError
from training.autotrain import stage
from training.autotrain.clock import Clock
from training.autotrain.facts import look_at_data, look_at_start
from training.autotrain.job import train
from training.autotrain.overrides import split_overrides
from training.autotrain.places import PLAN, check_places, training_folder
from training.autotrain.plan import Plan, TrainOptions, changes_transformer, continued_plan
from training.autotrain.recipes import check_overrides
from training.autotrain.shapes import SHAPES
from training.autotrain.speeds import MeasuredSpeeds
from training.autotrain.stage import Stage, read_progress, run_stage, steps_until, worth_stopping
from training.data.sources.open_dataset import open_dataset
from training.evaluation.reconstruction import evaluate_reconstruction

run = command_line.run


def pictures(folder: Path, count: int = 12, side: int = 40) -> Path:
    """A folder of captioned images; every second caption is `a red square`."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (side, side), (250, 20 * number, 0)).save(folder / f"{number}.png")
        text = "a red square" if number % 2 else f"square number {number}"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def lines(ran) -> str:
    assert len(ran.err) == 1, ran.err
    return ran.err[0]


# ---- refusals

def test_wrong_data_is_refused_as_by_data_check_and_nothing_is_made(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "a.png")
    for name, code in (("missing", 2), ("empty", 4), ("bare", 4)):
        before = sorted(tmp_path.rglob("*"))
        ran = run("train", tmp_path / name, "--out", tmp_path / "model", "--minutes", 5)
        assert ran.code == code
        assert str(tmp_path / name) in lines(ran)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("options", "words"), [
    (["--minutes", "0.2"], "--minutes 0.2: give 1 to"),
    (["--minutes", "soon"], "invalid float value: 'soon'"),
    (["--minutes", "5", "--size", "50"], "--size 50"),
    (["--minutes", "5", "--seed", "-1"], "'-1': give a number"),
    (["--minutes", "100000"], "--minutes 100000: give 1 to 86,400"),
    (["--minutes", "5", "--widht", "64"], "unrecognized arguments: --widht 64"),
    (["--minutes", "5", "--tokenizer.model.chanels", "8"], "--tokenizer.model.chanels'; did you mean"),
    (["--minutes", "5", "--transformer.optim.lr", "-1"], "optim.lr"),
    (["--minutes", "5", "--transformer.optim.lr"], "--transformer.optim.lr needs a value"),
    (["--minutes", "5", "--tokenizer.model.resolution", "48"], "use --size"),
    (["--minutes", "5", "--transformer.run_dir", "x"], "`tokenloom train` decides it"),
    (["--minutes", "5", "--transformer.data", "{path: other}"], "`tokenloom train` decides it"),
    (["--minutes", "5", "--transformer.checkpoint", "{resume: never}"], "`tokenloom train` decides it"),
    (["--minutes", "5", "--tokenizer.data.caption_column", "label"], "give --data.caption_column"),
    (["--minutes", "5", "--split", "tests"], "no split 'tests'")])
def test_wrong_options_are_one_line_before_any_work(run, tmp_path, options, words):
    data = pictures(tmp_path / "data")
    ran = run("train", data, "--out", tmp_path / "model", *options)
    assert ran.code == 2
    assert words in lines(ran)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_model_of_another_origin_is_kept(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="was not trained there"):
        check_places(str(model), None)
    (model / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        check_places(str(model), None)


def test_the_training_folder_may_hold_nothing_of_others(tmp_path):
    training = training_folder(tmp_path / "model")
    training.mkdir()
    (training / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        check_places(str(tmp_path / "model"), None)


def test_a_model_inside_the_data_or_around_it_is_refused(tmp_path):
    data = pictures(tmp_path / "data")
    for out in (data, data / "model", tmp_path):
        with pytest.raises(UserError, match=r"data folder|holds other files"):
            check_places(str(out), str(data))
    check_places(str(tmp_path / "model"), str(data))


def test_another_command_does_not_go_on_with_a_begun_training(tmp_path):
    options = TrainOptions("data", str(tmp_path / "model"), 20)
    assert continued_plan(options) is None
    folder = training_folder(options.out)
    folder.mkdir()
    (folder / PLAN).write_text(json.dumps({"arguments": options.plain()}))
    with pytest.raises(UserError, match=r"begun with another --minutes \(20, not 60\)"):
        continued_plan(TrainOptions("data", options.out, 60))
    with pytest.raises(UserError, match=r"another start \(--from-scratch, not shipped\)"):
        continued_plan(TrainOptions("data", options.out, 20, start_from="shipped"))
    keys = {"tokenizer": ["--optim.lr", "1"], "transformer": []}
    with pytest.raises(UserError, match="begun with other --tokenizer and --transformer keys;"):
        continued_plan(TrainOptions("data", options.out, 20, overrides=keys))


# ---- keys of the scripts

def test_keys_go_to_their_script():
    words = ["--tokenizer.optim.lr", "0.1", "pictures", "--transformer.model.width=128", "--out", "model"]
    found, others = split_overrides(words)
    assert found == {"tokenizer": ["--optim.lr", "0.1"], "transformer": ["--model.width", "128"]}
    assert others == ["pictures", "--out", "model"]
    check_overrides(found)


@pytest.fixture
def measured() -> MeasuredSpeeds:
    """Speeds whose workers are never asked."""
    workers = SimpleNamespace(import_seconds=1.0)
    return MeasuredSpeeds(workers, EMOJI, TWO_CORES, {"tokenizer": [], "transformer": []})  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "words"), [
    (["--train.batch_size", "5"], "--transformer.*: train.batch_size 5 is not divisible by 2 processes"),
    (["--deepspeed.config", "no.json"], "no.json")])
def test_what_a_script_would_refuse_when_it_starts_is_refused_when_it_is_measured(measured, keys, words):
    measured.overrides["transformer"] = keys
    with pytest.raises((UserError, MissingFileError), match=re.escape(words)):
        measured.row(SHAPES[0], 320)


def test_a_tokenizer_of_the_users_own_shape_begins_with_no_other_ones_weights(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("training.autotrain.job.train", lambda options, *rest: asked.append(options.start_from))
    monkeypatch.setattr("training.autotrain.plan.shipped_start", lambda: "shipped")
    data = pictures(tmp_path / "data")
    for options in ([], ["--from-scratch"], ["--tokenizer.model.codebook_size", 64], ["--tokenizer.optim.lr", "0.01"]):
        assert run("train", *options, data, "--out", tmp_path / "model", "--minutes", 5).code == 0
    assert asked == ["shipped", None, None, "shipped"]


def test_data_that_changed_since_the_training_was_begun_is_refused(tmp_path):
    options = TrainOptions(str(pictures(tmp_path / "data")), str(tmp_path / "model"), 20, overrides={})
    plan = Plan(chosen(size=32), EMOJI, TWO_CORES, start_seconds=1.0)
    training_folder(options.out).mkdir()
    (training_folder(options.out) / PLAN).write_text(json.dumps(plan.plain(options)))
    with pytest.raises(UserError, match=r"held 300 images when the training in .* and holds 12 now"):
        train(options, dry_run=True)


# ---- data

def test_the_data_is_looked_at(tmp_path):
    source = open_dataset(str(pictures(tmp_path / "data")))
    facts = look_at_data(source, None, {})
    assert (facts.images, facts.shorter_side, facts.held_out) == (12, 40, None)
    assert (facts.captions, facts.distinct) == (12, 7)
    assert 3 < facts.text_ids < 30


def test_a_held_out_split_of_the_data_is_found(tmp_path):
    pictures(tmp_path / "data" / "train")
    pictures(tmp_path / "data" / "validation", 4)
    source = open_dataset(str(tmp_path / "data"))
    facts = look_at_data(source, None, {})
    assert (facts.images, facts.held_out, facts.held_out_images) == (12, "validation", 4)
    named = look_at_data(source, "train", {})
    assert (named.held_out, named.held_out_images) == ("validation", 4)


def test_a_model_to_start_from_is_tried_on_the_data(tmp_path):
    model = tiny.model_folder(tmp_path / "start")
    source = open_dataset(str(pictures(tmp_path / "data")))
    facts = look_at_start(model, source)
    assert (facts.size, facts.grid, facts.codebook_size, facts.width) == (16, (4, 4), 32, 32)
    tokenizer = load_tokenizer(model / "tokenizer_image")
    assert facts.psnr == pytest.approx(evaluate_reconstruction(tokenizer, source)["psnr"])
    words = TextTokenizer.from_pretrained(model / "text_tokenizer")
    fits = [words.count(source.captions(row)[0]) <= tiny.TEXT_LENGTH for row in range(12)]
    assert facts.captions_fit == sum(fits) / 12
    assert 0 < facts.captions_fit < 1


@pytest.mark.parametrize(("stage", "key", "changes"), [
    ("transformer", "--model.width", True), ("transformer", "--text.vocab_size", True),
    ("tokenizer", "--train.trained_part", True), ("transformer", "--optim.lr", False), ("tokenizer", "--optim.lr", False)])
def test_keys_that_make_another_transformer_begin_with_none(stage, key, changes):
    assert changes_transformer({"tokenizer": [], "transformer": [], stage: [key, "1"]}) is changes


# ---- time

def test_the_time_before_a_stop_counts(tmp_path):
    first = Clock(tmp_path / "time.json", 100, time.monotonic() - 30)
    first.begin("tokenizer")
    first.save()
    second = Clock(tmp_path / "time.json", 100)
    assert 30 <= second.spent < 60
    assert 40 < second.left <= 70
    assert second.stages["choices"] >= 30


def test_a_damaged_note_of_the_time_counts_as_none(tmp_path):
    (tmp_path / "time.json").write_text("{half")
    assert Clock(tmp_path / "time.json", 100).spent < 30


def metrics(folder: Path, rows: list[tuple[int, float]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps({"step": step, "elapsed_s": seconds, "loss": 1.0}) + "\n" for step, seconds in rows)
    (folder / "metrics.jsonl").write_text(text)


def test_speed_is_that_of_the_newest_start(tmp_path):
    assert read_progress(tmp_path) == (0, None)
    metrics(tmp_path, [(10, 100), (20, 200), (30, 10), (40, 20), (50, 30), (60, 40)])
    assert read_progress(tmp_path) == (60, 1.0)
    metrics(tmp_path, [(10, 100), (20, 200), (30, 10)])
    assert read_progress(tmp_path) == (30, None)


def test_steps_fill_the_time_that_is_left_and_never_undo_what_is_done():
    assert steps_until(100, 20, 10, 0, 0.5) == 140
    assert steps_until(100, 20, 10, 50, 0.5) == 190
    assert steps_until(100, 120, 10, 50, 0.5) == 50
    assert steps_until(100, 120, 10, 0, 0.5) == 20


def test_a_run_is_stopped_for_other_steps_only_where_that_gains_time():
    assert worth_stopping(late=100, left=200, tolerated=60, start_seconds=10)
    assert worth_stopping(late=-100, left=200, tolerated=60, start_seconds=10)
    assert not worth_stopping(late=50, left=200, tolerated=60, start_seconds=10)
    assert not worth_stopping(late=100, left=15, tolerated=1, start_seconds=10)


def test_a_slow_stage_is_stopped_and_goes_on_with_fewer_steps(tmp_path, monkeypatch):
    run_dir, asked = tmp_path / "run", []

    def pretend(script, *arguments, look):
        asked.append(int(arguments[-1]))
        if len(asked) == 1:  # four times slower than it was measured
            metrics(run_dir, [(step, 4.0 * step) for step in range(1, 11)])
            (run_dir / "checkpoints" / "step-00000010").mkdir(parents=True)
            assert look()
            return False
        return True

    monkeypatch.setattr(stage, "launch", pretend)
    clock = Clock(tmp_path / "time.json", 1000)
    run_stage(Stage("transformer", "train_seq2seq.py", run_dir, [], until=500, start_seconds=10, seconds_per_step=1.0,
                    tolerance=0.07), clock)
    assert asked[0] in range(480, 491)
    assert asked[1] in range(128, 134)  # the 10 that are done, and as many as 490 s hold at 4 s each


def test_steps_that_the_user_sets_are_no_matter_of_time(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stage, "launch", lambda script, *arguments, look: asked.append(arguments[-1]) or True)
    run_stage(Stage("tokenizer", "x.py", tmp_path, [], 500, 10, 1.0, 0.1, steps=7), Clock(tmp_path / "time.json", 1000))
    assert asked == [7]
