"""Metrics with known answers, pictures for people, and what a run logs."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.bad_images import corrupt_png
from tokenloom_common.errors import DataError
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.evaluation.caption_accuracy import (
    FEATURE_SIDE,
    Question,
    TrainingPictures,
    choose_questions,
    nearest,
    picture_features,
    sample_questions,
)
from training.evaluation.image_metrics.pixel_metrics import PERFECT_DB, psnr
from training.evaluation.plots import plot_curves
from training.evaluation.reconstruction import evaluate_reconstruction
from training.evaluation.sheets import labelled_grid, side_by_side
from training.loop.log import RunLog
from training.runs.metrics import read_metrics

THINGS = ("heart", "circle", "square", "octopus", "tree", "boat")
STYLES = ("noto", "flat")


def picture(seed: int, size: int = 20) -> Image.Image:
    """Large blocks of random colour: far apart from one another even when averaged down."""
    blocks = numpy.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST)


def write_data(folder, caption: bool = True):
    """Every thing in two styles; `text` is the caption that is trained on, `caption` the base."""
    folder.mkdir()
    rows = []
    for number, (thing, style) in enumerate((t, s) for t in THINGS for s in STYLES):
        picture(number).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": [f"a {thing}", f"a {thing}, {style} style"], "style": style}
        rows.append(row | ({"caption": f"a {thing}"} if caption else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> CaptionedImages:
    return open_dataset(write_data(tmp_path_factory.mktemp("evaluation") / "data"))


# ---- reconstruction ----

def test_psnr_by_hand():
    black = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    other = black.clone()
    other[0] += 255  # error 255^2: 0 dB
    other[1] += 10  # error 100: 10 log10(650.25)
    other[2, 0, 0, 0] = 12  # error 144 / 12 = 12
    expected = [0.0, 10 * math.log10(650.25), 10 * math.log10(255**2 / 12)]
    assert psnr(black, other).tolist() == pytest.approx(expected, abs=1e-9)
    assert psnr(other, black).tolist() == pytest.approx(expected, abs=1e-9)  # uint8 must not wrap around


def test_psnr_of_equal_pictures_is_100():
    pixels = torch.from_numpy(numpy.asarray(picture(0)).copy())[None]
    assert psnr(pixels, pixels).tolist() == [PERFECT_DB] == [100.0]


def test_reconstruction_counts_every_picture_in_any_batch_size(source):
    reports = [evaluate_reconstruction(tiny.vqgan(), source, batch_size=size) for size in (5, 64)]
    assert reports[0]["pictures"] == reports[1]["pictures"] == len(source) == 12
    assert reports[0]["unusable"] == 0
    assert reports[0]["psnr"] == pytest.approx(reports[1]["psnr"], abs=1e-4)
    assert 0 < reports[0]["codebook_usage"] == reports[1]["codebook_usage"] <= 1
    assert 1 <= reports[0]["codebook_perplexity"] <= 32


def test_reconstruction_leaves_out_and_counts_bad_pictures(tmp_path):
    folder = write_data(tmp_path / "data")
    (folder / "3.png").write_bytes(corrupt_png())
    report = evaluate_reconstruction(tiny.vqgan(), open_dataset(folder), batch_size=1)
    assert (report["pictures"], report["unusable"]) == (11, 1)
    for path in folder.glob("*.png"):
        path.write_bytes(corrupt_png())
    with pytest.raises(DataError, match="no usable picture"):
        evaluate_reconstruction(tiny.vqgan(), open_dataset(folder))


# ---- caption accuracy ----

def test_features_are_area_means_in_0_to_1():
    image = Image.new("RGB", (FEATURE_SIDE * 2, FEATURE_SIDE * 2), (0, 255, 51))
    image.putpixel((0, 0), (255, 255, 51))
    features = picture_features([image]).view(FEATURE_SIDE, FEATURE_SIDE, 3)
    assert features.dtype == torch.float32
    assert features[5, 5].tolist() == pytest.approx([0, 1, 0.2])
    assert features[0, 0].tolist() == pytest.approx([64 / 255, 1, 0.2])  # one of four pixels, in whole numbers


def test_nearest_by_hand():
    reference = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]])
    assert nearest(torch.tensor([[0.4, 0.4], [0.6, 0.6], [9.0, 9.0]]), reference).tolist() == [0, 1, 2]


def test_pictures_of_the_training_set_score_1_and_shuffled_ones_score_0(source):
    reference = TrainingPictures(source, resolution=20)
    images = [source[row].image for row in range(len(source))]
    questions = [Question("asked", source.metadata(row)["caption"]) for row in range(len(source))]
    report = reference.score(images, questions)
    assert report["accuracy"] == 1
    assert (report["captions"], report["base_captions"], report["training_pictures"]) == (12, 6, 12)
    assert report["chance"] == pytest.approx(1 / 6)
    assert reference.score(images[2:] + images[:2], questions)["accuracy"] == 0  # every picture belongs to the next thing
    assert reference.score(images[:6] + images[8:] + images[6:8], questions)["accuracy"] == 0.5


def test_the_nearest_picture_of_another_style_of_the_thing_counts(source):
    reference = TrainingPictures(source, resolution=20)
    other_style = source[1].image  # of the thing of row 0
    assert reference.score([other_style], [Question("a heart, noto style", "a heart")])["accuracy"] == 1


def test_a_number_of_pictures_that_differs_from_the_questions_is_refused(source):
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        TrainingPictures(source, resolution=20).score([picture(0)], [Question("a", "a")] * 2)


def test_questions_have_different_base_captions_and_depend_on_the_seed_alone(source):
    questions = choose_questions(source, 6, seed=1)
    assert {q.base_caption for q in questions} == {f"a {thing}" for thing in THINGS}
    assert questions == choose_questions(source, 6, seed=1)
    assert questions != choose_questions(source, 6, seed=2)
    assert choose_questions(source, 3, seed=1) == questions[:3]
    assert all(q.caption.startswith(f"{q.base_caption}, ") and q.caption.endswith(" style") for q in questions)


def test_more_questions_than_base_captions_repeat_bases_with_other_rows(source):
    questions = choose_questions(source, 100, seed=0)
    assert len(questions) == len(set(questions)) == 12
    assert len({q.base_caption for q in questions[:6]}) == 6


@pytest.mark.parametrize("use", [lambda s: TrainingPictures(s, 20), lambda s: choose_questions(s, 3, 0)])
def test_data_without_base_captions_is_refused_in_words(tmp_path, use):
    without = open_dataset(write_data(tmp_path / "data", caption=False))
    with pytest.raises(DataError, match=r"no `caption` column.*caption accuracy needs one"):
        use(without)


def test_sampled_questions_are_one_picture_each_in_order():
    class Model:
        def generate(self, prompts, seed):
            self.calls = [*getattr(self, "calls", []), (list(prompts), seed)]
            return type("Result", (), {"images": [f"picture of {p}" for p in prompts]})

    model, questions = Model(), [Question(f"c{i}", "c") for i in range(5)]
    assert sample_questions(model, questions, 7, "sample", batch_size=2) == [f"picture of c{i}" for i in range(5)]
    assert model.calls == [(["c0", "c1"], 7), (["c2", "c3"], 9), (["c4"], 11)]


# ---- pictures for people ----

def test_a_labelled_grid_shows_every_picture_its_caption_and_its_title():
    red, blue = (Image.new("RGB", (5, 5), colour) for colour in ("red", "blue"))
    sheet = labelled_grid([("seen", [("a red square", red)] * 3), ("unseen", [("", blue)])], side=40, columns=2)
    assert sheet.mode == "RGB"
    assert sheet.width == 2 * (40 + 16)
    pixels = numpy.asarray(sheet).astype(int)
    assert (pixels == (255, 0, 0)).all(-1).sum() == 3 * 40 * 40
    assert (pixels == (0, 0, 255)).all(-1).sum() == 40 * 40
    dark = (pixels.max(-1) < 128) & (pixels.min(-1) < 128)
    rows_with_text = numpy.flatnonzero(dark.any(axis=1))
    first_picture = numpy.flatnonzero((pixels == (255, 0, 0)).all(-1).any(axis=1))[0]
    assert (rows_with_text < first_picture).any()  # the title
    assert dark[first_picture + 42: first_picture + 60, :56].any()  # the caption below
    blue_rows = numpy.flatnonzero((pixels == (0, 0, 255)).all(-1).any(axis=1))
    assert not dark[blue_rows[-1] + 2:].any()  # an empty caption


def test_a_long_caption_and_a_full_row_stay_inside_the_sheet():
    cells = [("a very long caption " * 20, Image.new("RGBA", (9, 3), "green"))] * 8
    sheet = labelled_grid([("t", cells)])
    assert sheet.width == 8 * 112
    assert numpy.asarray(sheet)[-8:].min() == 255  # the margin below


@pytest.mark.parametrize(("own", "shown"), [(32, 128), (16, 128), (48, 96), (200, 200), (512, 256)])
def test_side_by_side_shows_original_reconstruction_and_the_difference_amplified(own, shown):
    original, rebuilt = (numpy.full((own, own, 3), value, dtype=numpy.uint8) for value in ((200, 10, 10), (210, 10, 110)))
    sheet = numpy.asarray(side_by_side([("worst\n3 dB", original, rebuilt), ("best", rebuilt, rebuilt)], factor=4, side=128))
    for colour, times in (((200, 10, 10), 1), ((210, 10, 110), 3), ((40, 0, 255), 1)):  # 4 x 100 is cut at 255, no wrapping
        assert (sheet == colour).all(-1).sum() == times * shown**2, colour
    assert sheet.shape[0] == 44 + 3 * (shown + 8)
    assert (sheet[-shown - 8:, -shown - 8:-8] == 0).all(-1).sum() == shown**2  # equal pictures: black
    assert (sheet[:40, -2 * shown:] < 100).any()  # labels above
    assert (sheet[44:, :60] < 100).any()  # names of the rows beside them


def test_curves_are_written_as_a_picture(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "usage": None}, {"step": 2, "loss": 1.0, "usage": 0.5}, {"step": 3, "loss": None}]
    plot_curves([("one", rows, ["loss"]), ("two", rows, ["loss", "usage"]), ("none", [], ["loss"])], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
        assert image.width > 3 * 300
        assert len(numpy.unique(numpy.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10


# ---- metrics.jsonl ----

def test_every_logged_line_is_json_and_a_number_that_is_none_becomes_null(tmp_path):
    log = RunLog(tmp_path, True, "test", total_steps=3, first_step=0)
    log.metrics(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "count": 3})
    log.metrics(2, {"loss": -math.inf})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert not any(word in line for line in lines for word in ("NaN", "Infinity"))
    first = json.loads(lines[0])
    assert first.pop("elapsed_s") >= 0
    assert first == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "count": 3}
    assert json.loads(lines[1])["loss"] is None


def test_only_the_first_process_writes(tmp_path, capsys):
    log = RunLog(tmp_path, False, "test", total_steps=3, first_step=0)
    log.metrics(1, {"loss": 1.0})
    log.step_done()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_lines_are_readable_while_the_run_goes_on(tmp_path):
    log = RunLog(tmp_path, True, "test", total_steps=3, first_step=0)
    log.metrics(1, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.close()
