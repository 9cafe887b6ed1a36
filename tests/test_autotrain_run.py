"""One real `tokenloom train`, as small as can be: three launches, and all that they leave. Shared by every test here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from inference import TextToImage
from tests import command_line
from tokenloom_common.errors import UserError
from training.autotrain.clock import Clock
from training.autotrain.job import AutoTrain, train
from training.autotrain.places import OUT_NAMES, check_places, training_folder
from training.autotrain.plan import TrainOptions, continued_plan
from training.autotrain.prepare import HELD_OUT, open_copy
from training.runs.metrics import read_metrics

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
run = command_line.run

OVERRIDES = {
    "tokenizer": ["--train.steps", "6", "--model.channels", "8", "--model.z_channels", "8", "--model.codebook_size", "32",
                  "--checkpoint.every_steps", "2"],
    "transformer": ["--train.steps", "6", "--model.width", "64", "--model.heads", "1", "--model.decoder_layers", "1",
                    "--model.encoder_layers", "1", "--checkpoint.every_steps", "2"],
}


def pictures(folder: Path) -> Path:
    """120 squares of 12 colors, each color a caption; one file is no picture."""
    folder.mkdir()
    for number in range(120):
        color = number % 12
        Image.new("RGB", (40, 32), (20 * color, 255 - 20 * color, number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a square of color {color}\nsquare number {color}")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("broken")
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> TrainOptions:
    root = tmp_path_factory.mktemp("autotrain")
    return TrainOptions(str(pictures(root / "pictures")), str(root / "model"), 1.0, seed=3, overrides=OVERRIDES)


@pytest.fixture(scope="module")
def trained(options) -> Iterator[TrainOptions]:
    train(options, dry_run=False)
    yield options


def test_a_dry_run_says_the_choices_and_makes_nothing(options, capsys):
    before = sorted(Path(options.out).parent.iterdir())
    if Path(options.out).exists():
        pytest.skip("trained already")
    train(options, dry_run=True)
    shown = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[0] for line in shown} >= {"data", "image size", "image tokenizer", "transformer"}
    assert sorted(Path(options.out).parent.iterdir()) == before


def test_the_model_folder_draws_pictures(trained):
    model = TextToImage.from_pretrained(trained.out)
    (image,) = model.generate("a square of color 3", seed=0).images
    assert image.size == (32, 32)
    assert model.seq2seq.config.width == 64
    assert model.default_params.guidance_scale == 2.0


def test_the_model_folder_holds_sheet_curves_and_page(trained):
    out = Path(trained.out)
    assert {path.name for path in out.iterdir()} <= set(OUT_NAMES)
    assert Image.open(out / "samples.png").width > 200
    assert Image.open(out / "curves.png").width > 200
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("Choices and why", "reconstruction", "captions tell", "caption accuracy", "What to do next",
                  "tokenloom generate", "codebook_size: 32", "the time is short"):
        assert words in page, words
    assert "Tokenloom" in (out / "README.md").read_text(encoding="utf-8")


def test_some_images_are_held_out_and_measured(trained):
    copy = training_folder(trained.out) / "data"
    held_out = open_copy(copy, HELD_OUT)
    assert held_out is not None
    assert len(held_out) == 10
    kept = {held_out.key(row) for row in range(10)}
    learned = open_copy(copy, "train")
    assert learned is not None
    assert kept.isdisjoint(learned.key(row) for row in range(len(learned)))
    assert len(learned) == 110
    figures = json.loads((training_folder(trained.out) / "figures.json").read_text())
    assert figures["measured_on"] == "held-out images"
    assert figures["images"] == 10
    assert figures["captions_tell"] == pytest.approx(figures["loss_without_caption"] - figures["loss"])


def test_the_keys_of_the_user_reached_the_scripts(trained):
    rows = read_metrics(training_folder(trained.out) / "transformer" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 6


def test_the_time_of_every_stage_is_noted(trained):
    stages = Clock(training_folder(trained.out) / "time.json", 60).stages
    assert {"choices", "data", "tokenizer", "tokens", "transformer", "report"} <= set(stages)
    assert all(stages[name] > 0 for name in ("tokenizer", "transformer"))


def test_the_same_command_again_reuses_everything(trained, capsys):
    before = (Path(trained.out) / "report.html").stat().st_mtime_ns
    check_places(trained.out, trained.data)
    train(trained, dry_run=False)
    assert (Path(trained.out) / "report.html").stat().st_mtime_ns == before
    assert "next: tokenloom generate" in capsys.readouterr().out


def test_another_command_for_the_same_place_is_refused(trained):
    with pytest.raises(UserError, match="begun with another --seed"):
        train(TrainOptions(trained.data, trained.out, 1.0, seed=4, overrides=OVERRIDES), dry_run=False)


def test_a_stage_that_was_killed_goes_on_from_its_checkpoint(trained):
    """Its export and the note of its end are gone, as if it had been killed before them."""
    folder = training_folder(trained.out)
    before = read_metrics(folder / "transformer" / "metrics.jsonl")
    (folder / "phases" / "transformer.json").unlink()
    (folder / "transformer" / "model" / "model_index.json").unlink()
    for path in sorted((folder / "transformer" / "model").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "transformer" / "model").rmdir()
    plan = continued_plan(trained)
    assert plan is not None
    AutoTrain(trained, plan, Clock(folder / "time.json", 60)).run()
    assert read_metrics(folder / "transformer" / "metrics.jsonl") == before  # not one step was made again
    assert (Path(trained.out) / "model_index.json").is_file()
