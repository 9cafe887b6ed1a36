"""The report of `tokenloom train`: figures in words, what to do next, and recipes that the scripts take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests import tiny
from tests.test_autotrain_choices import EMOJI, KNOWING, ONE_GPU, PHOTOS, SHIPPED, TWO_CORES, Speeds, chosen
from tokenloom_common.errors import DataError, UserError
from training.autotrain.clock import Clock
from training.autotrain.job import AutoTrain
from training.autotrain.plan import Plan, TrainOptions
from training.autotrain.prepare import HELD_OUT, open_copy, write_copy
from training.autotrain.recipes import (
    STAND_INS,
    check_size_of,
    read_stage,
    tokenizer_values,
    transformer_values,
)
from training.autotrain.report import figure_rows, next_steps, page
from training.autotrain.words import Line, format_lines
from training.data.sources.open_dataset import open_dataset

FIGURES = {"measured_on": "held-out images", "images": 15, "reconstruction_psnr": 24.0, "loss": 3.0,
           "loss_without_caption": 3.5, "captions_tell": 0.5, "caption_accuracy": 0.9,
           "caption_accuracy_details": {"captions": 100, "chance": 0.01}}


def advice(**changed) -> str:
    return "\n".join(next_steps({**FIGURES, **changed}, 20, "tokenloom train d --out m", "tokenloom generate x"))


def test_advice_follows_from_what_was_measured():
    assert advice().splitlines()[0] == "tokenloom generate x"
    assert "--minutes 60" in advice(reconstruction_psnr=18.0)
    assert "captions tell the model little" in advice(captions_tell=0.01, caption_accuracy=0.4)
    assert "known by heart (1.00)" in advice(captions_tell=-0.4, caption_accuracy=1.0)
    assert "tell the model little" not in advice(captions_tell=-0.4, caption_accuracy=1.0)
    assert "in part (0.40)" in advice(caption_accuracy=0.4)
    assert "images that the model has seen" in advice(measured_on="training images")


def test_figures_say_what_they_were_measured_on():
    rows = dict(figure_rows(FIGURES))
    assert rows["reconstruction"] == "24.0 dB on 15 held-out images"
    assert rows["captions tell"] == "0.500 nats a token"
    assert "chance 0.010" in rows["caption accuracy"]
    without = {name: value for name, value in FIGURES.items() if not name.startswith("caption_accuracy")}
    assert "caption accuracy" not in dict(figure_rows(without))


def test_the_page_is_one_file_and_escapes_what_the_user_named():
    text = page("<model>", [Line("size", "32 px", "a < b")], ["short"], FIGURES, {"tokenizer": 300.0}, ["more"],
                {"Samples": Image.new("RGB", (4, 4))}, {"Config": "a: 1"})
    assert "&lt;model&gt;" in text and "a &lt; b" in text and "<model>" not in text
    assert text.count("data:image/png;base64,") == 1
    assert "5 minutes" in text and "http" not in text


def test_choices_are_lines_of_name_value_and_reason():
    assert format_lines([Line("image size", "32 px", "why"), Line("x", "y", "")]) == [
        "image size          32 px  (why)", "x                   y"]


@pytest.mark.parametrize(("data", "machine", "minutes", "start"), [
    (EMOJI, TWO_CORES, 2, None), (EMOJI, TWO_CORES, 20, SHIPPED), (EMOJI, TWO_CORES, 20, KNOWING), (PHOTOS, ONE_GPU, 60, None),
    (PHOTOS, ONE_GPU, 6000, None)])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_every_choice_makes_configs_that_the_scripts_take(data, machine, minutes, start, size):
    choices = chosen(data, machine, minutes, Speeds(0.1), start, size)
    values = tokenizer_values(choices, machine)
    if choices.shape.start is None:
        config = read_stage("tokenizer", STAND_INS["tokenizer"], {"tokenizer": []}, values)
        check_size_of(config, size, "data")
        side = size // choices.shape.patch
        assert config.model.grid == (side, side)
        assert config.train.steps == choices.tokenizer_steps
    else:  # the model's config is read from the folder, which is none here
        assert values["init_from"] == "shipped" and "model" not in values
    values = transformer_values(choices, code_tables=True, keep_best=choices.keeps_best)
    if choices.shape.start_width is not None:  # so is its transformer's
        assert values.pop("init_from") == "shipped" and set(values["model"]) == {"dropout"} and "text" not in values
        assert not values["code_tables_from_codebook"]
    places = [*STAND_INS["transformer"], "--data.validation_split", HELD_OUT]
    config = read_stage("transformer", places, {"transformer": []}, values)
    assert config.train.steps == choices.steps
    assert config.checkpoint.keep_best is choices.keeps_best is (data is PHOTOS)
    assert config.optim.warmup_steps < config.train.steps


@pytest.mark.parametrize(("quantizer", "code_tables"), [({"kind": "vq"}, True), ({"kind": "residual", "depth": 2}, False)])
def test_code_tables_follow_a_codebook_that_has_a_vector_per_code(quantizer, code_tables, tmp_path, monkeypatch):
    plan = Plan(chosen(size=32), EMOJI, TWO_CORES, start_seconds=1.0)
    training = AutoTrain(TrainOptions("pictures", str(tmp_path / "model"), 20), plan, Clock(tmp_path / "time.json", 1200))
    tiny.vqgan(quantizer=quantizer).save_pretrained(training.tokenizer / "model")
    monkeypatch.setattr(training, "_run", lambda *arguments: None)
    training._train_transformer(tmp_path / "run")
    recipe = yaml.safe_load((training.folder / "transformer.yaml").read_text())
    assert recipe["code_tables_from_codebook"] is code_tables


def test_a_model_of_another_size_than_chosen_is_refused_with_the_option():
    choices = chosen(size=32)
    config = read_stage("tokenizer", STAND_INS["tokenizer"], {"tokenizer": ["--model.preset", "vq-16"]},
                        tokenizer_values(choices, TWO_CORES))
    with pytest.raises(UserError, match="give --size"):
        check_size_of(config, 32, "data")


def make_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"red {number}")
    return folder


def test_the_copy_holds_squares_and_keeps_held_out_images_apart(tmp_path):
    source = open_dataset(str(make_pictures(tmp_path / "data", 120)))
    choices = chosen(EMOJI, size=32)
    options = TrainOptions(str(tmp_path / "data"), "model", 60)
    write_copy(source, None, choices, tmp_path / "copy", options, lambda: None)
    learned, held_out = open_copy(tmp_path / "copy", "train"), open_copy(tmp_path / "copy", HELD_OUT)
    assert learned is not None and held_out is not None
    assert (len(learned), len(held_out)) == (105, 15)
    assert learned[0].image.size == (32, 32)
    assert learned.metadata(0)["caption"] == learned.captions(0)[0]
    assert {learned.key(row) for row in range(105)}.isdisjoint(held_out.key(row) for row in range(15))


def test_too_many_unusable_images_are_data_that_cannot_be_used(tmp_path):
    folder = make_pictures(tmp_path / "data", 40)
    for number in range(12):
        (folder / f"bad{number}.png").write_bytes(b"no picture")
        (folder / f"bad{number}.txt").write_text("bad")
    options = TrainOptions(str(folder), "model", 60)
    with pytest.raises(DataError, match="tokenloom data check"):
        write_copy(open_dataset(str(folder)), None, chosen(EMOJI, size=32), tmp_path / "copy", options, lambda: None)
    assert not (tmp_path / "copy").exists()
    tolerant = TrainOptions(str(folder), "model", 60, max_bad_fraction=1.0)
    write_copy(open_dataset(str(folder)), None, chosen(EMOJI, size=32), tmp_path / "copy", tolerant, lambda: None)
    assert open_copy(tmp_path / "copy", "train") is not None
