"""A tokenizer's run says in words when the images do not come through, and when they do."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from torch import Tensor

from tests import launching
from tests.tokenizer_runs import MODEL, VQ, config, make_data, train
from tokenizer_image import Reconstruction
from tokenloom_common.config import dotted_names, merge
from training.config.tokenizer import TokenizerRunConfig
from training.engine.processes import Processes
from training.objectives.tokenizer_health import TokenizerHealth
from training.runs.metrics import read_metrics

SIDE, CODES = 16, 16
ALONE = Processes(0, 1, 0, torch.device("cpu"))
MANY_CODES = torch.arange(8).repeat(8).view(1, 8, 8)  # half of them
ONE_CODE = torch.zeros(1, 8, 8, dtype=torch.int64)
ALL_CODES = torch.arange(16).repeat(4).view(1, 8, 8)


def make_health(**changes) -> TokenizerHealth:
    run = config(Path("data"), Path("run"), model=changes.pop("model", VQ), codebook={"warn_below": 0.9}, **changes)
    return TokenizerHealth(run, ALONE, images=16)


def feed(health: TokenizerHealth, steps: range, share: float, codes: Tensor = ALL_CODES, log_every: int = 10
         ) -> list[dict[str, float]]:
    """Show it reconstructions that keep `share` of each image; return the numbers of its log lines."""
    lines = []
    for step in steps:
        image = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(step)) * 2 - 1
        reconstruction = 0.9 * (1 - share) + share * image
        health.update(image, Reconstruction(reconstruction, codes.expand(8, 8, 8), {}), 0, step)
        if (step + 1) % log_every == 0:
            lines.append(health.report())
    return lines


def said(caplog, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.fixture(autouse=True)
def _hear_all(caplog):
    caplog.set_level(logging.INFO)


# ---- while it trains

def test_blank_images_are_warned_of_once_and_again_after_they_came_through(caplog):
    health = make_health()
    lines = feed(health, range(400), 0.0)
    assert lines[-1]["reconstruction_spread"] == pytest.approx(0, abs=1e-6)
    (warning,) = said(caplog, "do not come through")
    assert re.search(r"after 210 steps .* keep 0 % of what tells them apart\. Try --", warning)
    assert "\n" not in warning

    lines = feed(health, range(400, 420), 0.8)
    assert lines[-1]["reconstruction_spread"] == pytest.approx(0.8, abs=1e-3)
    assert said(caplog, "come through now") == [
        "the pictures come through now: their reconstructions keep 80 % of what tells them apart"]
    feed(health, range(420, 460), 0.03)
    assert len(said(caplog, "do not come through")) == 2


@pytest.mark.parametrize(("steps", "share"), [(range(180), 0.0), (range(400), 0.3)], ids=["just begun", "healthy"])
def test_a_run_that_has_just_begun_or_learns_is_not_warned_of(caplog, steps, share):
    feed(make_health(), steps, share)
    assert not said(caplog, "come through")


def test_a_long_warm_up_is_no_collapse(caplog):
    health = make_health(optim={"warmup_steps": 500}, train={"steps": 1000})
    feed(health, range(690), 0.0)
    assert not said(caplog, "come through")
    feed(health, range(690, 720), 0.0)
    assert said(caplog, "do not come through")


@pytest.mark.parametrize(("steps", "first"), [(1000, 210), (8000, 410), (1_000_000, 2010)])
def test_a_long_run_gets_more_time_before_it_is_judged(caplog, steps, first):
    health = make_health(train={"steps": steps})
    feed(health, range(first - 150, first + 50), 0.0)
    (warning,) = said(caplog, "do not come through")
    assert f"after {first:,} steps" in warning


def test_a_number_that_varies_around_the_threshold_is_reported_once(caplog):
    health = make_health()
    for part, share in enumerate([0.09, 0.11, 0.09, 0.12, 0.08]):
        feed(health, range(300 + 20 * part, 320 + 20 * part), share)
    assert len(said(caplog, "come through")) == 1


def test_images_that_are_all_the_same_raise_no_alarm(caplog):
    health = make_health()
    image = torch.full((8, 3, SIDE, SIDE), 0.25)
    for step in range(300):
        health.update(image, Reconstruction(image * 0, ALL_CODES.expand(8, 8, 8), {}), 0, step)
        line = health.report()
    assert "reconstruction_spread" not in line
    assert not said(caplog, "come through")


@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_few_images_between_two_log_lines_wait_for_more(caplog, log_every):
    health = make_health()
    lines = feed(health, range(300), 0.0, log_every=log_every)
    assert all(-0.01 < line["reconstruction_spread"] < 0.01 for line in lines)
    (warning,) = said(caplog, "do not come through")
    pictures = int(re.search(r"last ([\d,]+) keep", warning)[1].replace(",", ""))
    assert pictures >= 64


@pytest.mark.parametrize("share", [0.05, 0.5], ids=["blank", "few codes"])
@pytest.mark.parametrize("stop", [5, 195, 214, 235])
def test_a_resumed_run_says_the_same(caplog, stop, share):
    whole = feed(make_health(), range(300), share, MANY_CODES)
    words = [record.getMessage() for record in caplog.records]
    caplog.clear()
    first, second = make_health(), make_health()
    lines = feed(first, range(stop), share, MANY_CODES)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    lines += feed(second, range(stop, 300), share, MANY_CODES)
    assert lines == whole
    assert [record.getMessage() for record in caplog.records] == words != []


# ---- what it advises

RUNS = {
    "debug": {},
    "half and half": {"loss": {"l2_weight": 1.0}},
    "squares": {"loss": {"l1_weight": 0.0, "l2_weight": 4.0}},
    "strong squares": {"loss": {"l1_weight": 0.0, "l2_weight": 30.0}, "train": {"steps": 1000}},
    "no commitment": {"model": MODEL, "loss": {"l1_weight": 0.0, "l2_weight": 1.0}},
    "slow": {"optim": {"lr": 1e-5}},
    "perceptual alone": {"loss": {"l1_weight": 0.0, "perceptual_weight": 1.0}},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_advice_names_options_that_the_run_can_take_and_has_not_taken(caplog, changes):
    health = make_health(**changes)
    feed(health, range(300), 0.0)
    (warning,) = said(caplog, "do not come through")
    run = health.reconstruction.config.plain()
    options = re.findall(r"--([\w.]+) ([\d.e-]+)", warning)
    assert {name for name, _ in options} <= set(dotted_names(TokenizerRunConfig))
    for name, value in options:
        section, key = name.split(".")
        assert run[section][key] != float(value)
        run[section][key] = value
    TokenizerRunConfig.parse(run, "advice")  # all at once is possible too


@pytest.mark.parametrize(("name", "absent"), [("squares", "l1_weight"), ("strong squares", "loss"),
                                             ("no commitment", "loss"), ("slow", "optim.lr")])
def test_what_a_run_does_already_is_no_advice(caplog, name, absent):
    feed(make_health(**RUNS[name]), range(300), 0.0)
    assert absent not in said(caplog, "do not come through")[0]


# ---- beside the codebook

def test_remedies_of_the_codebook_are_not_advised_while_images_are_blank(caplog):
    health = make_health()
    lines = feed(health, range(300), 0.0, MANY_CODES)
    assert lines[-1]["codebook_usage"] == 0.5
    assert said(caplog, "do not come through")
    assert not said(caplog, "codes are in use")
    feed(health, range(300, 320), 0.5, MANY_CODES)  # images come through, half of the codes is still unused
    assert len(said(caplog, "codes are in use")) == 1


def test_a_codebook_of_one_code_may_be_why_images_are_blank(caplog):
    feed(make_health(), range(300), 0.0, ONE_CODE)
    assert len(said(caplog, "only 6 % of the 16 codes are in use")) == 1
    assert said(caplog, "do not come through")


def test_a_warning_of_unused_codes_is_taken_back(caplog):
    health = make_health()
    feed(health, range(30), 0.5, MANY_CODES)
    assert len(said(caplog, "only 50 % of the 16 codes")) == 1
    assert not said(caplog, "recovered")
    feed(health, range(30, 60), 0.5, ALL_CODES)
    assert said(caplog, "recovered") == [
        "the codebook has recovered: 100 % of the 16 codes are in use (perplexity 16)"]
    feed(health, range(60, 90), 0.5, MANY_CODES)
    assert len(said(caplog, "only 50 % of the 16 codes")) == 2


# ---- whole runs

def write_pictures(folder: Path, kind: str, count: int = 60) -> Path:
    """Pictures of 32 px that are mostly background, or one picture many times."""
    random = numpy.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGB", (32, 32), "black" if kind == "mask" else "white")
        draw = ImageDraw.Draw(picture)
        points = [tuple(map(int, random.integers(3, 29, 2))) for _ in range(4)]
        if kind == "sketch":
            draw.line(points, fill="black")
        elif kind == "mask":
            draw.polygon(points, fill="white")
        elif kind == "diagram":
            for x, y in points:
                draw.rectangle([x, y, x + 5, y + 4], outline="black")
        picture.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"a {kind}")
    return folder


def of_recipe(pictures: Path, run_dir: Path, **changes) -> TokenizerRunConfig:
    recipe = yaml.safe_load((launching.RECIPES / "debug_tokenizer.yaml").read_text())
    own = {"data": {"path": str(pictures)}, "run_dir": str(run_dir), "checkpoint": {"every_steps": 0},
           "train": {"sample_every": 0, "threads": 1}}
    return TokenizerRunConfig.parse(merge(merge(recipe, own), changes), "test")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sketch", "mask"])
def test_the_debug_recipe_lets_pictures_of_mostly_background_through(group, tmp_path, caplog, kind):
    run = of_recipe(write_pictures(tmp_path / kind, kind), tmp_path / "run")
    train(run, group).finish()
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["reconstruction_spread"] > 0.15
    assert not said(caplog, "come through")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["diagram"])
def test_a_run_whose_pictures_turned_to_blank_paper_says_so_in_the_end(group, tmp_path, caplog, kind):
    data = write_pictures(tmp_path / kind, kind)
    run = of_recipe(data, tmp_path / "run", loss={"l1_weight": 1.0, "l2_weight": 0.0}, train={"steps": 40, "weight_ema": 0.9})
    train(run, group).finish()
    (warning,) = said(caplog, "do not come through this tokenizer")
    assert "of 60 training pictures" in warning
    assert "keep 0 % of what tells them apart" in warning
    assert "--train.steps 240; or --loss.l1_weight 0 --loss.l2_weight 4;" in warning


@pytest.mark.long
def test_a_run_on_one_picture_many_times_has_no_number_and_no_alarm(group, tmp_path, caplog):
    data = write_pictures(tmp_path / "same", "same")
    train(of_recipe(data, tmp_path / "run", train={"steps": 8}), group).finish()
    assert all("reconstruction_spread" not in row for row in read_metrics(tmp_path / "run/metrics.jsonl"))
    assert not said(caplog, "come through")


@pytest.mark.long
def test_the_held_out_report_and_the_card_have_the_number(group, tmp_path):
    held_out = {"data": {"validation_split": "unseen_combination"}, "train": {"steps": 4}}
    run = of_recipe(make_data(tmp_path / "shapes"), tmp_path / "run", **held_out)
    train(run, group).finish()
    report = json.loads((tmp_path / "run/validation.json").read_text())
    assert -1 < report["reconstruction_spread"] < 1
    assert "share kept of what tells pictures apart" in (tmp_path / "run/model/README.md").read_text()
