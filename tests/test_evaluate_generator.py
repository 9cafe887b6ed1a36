"""`tokenloom evaluate generator`: what its report holds, and every wrong use in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
from PIL import Image

import tokenloom
from inference import SamplingParams, TextToImage, save_model_folder
from seq2seq import ClassLabels
from tests import tiny
from tests.evaluation_images import ROWS, colour_extractor, generator_folders, report_in
from tokenizer_image.fingerprint import code_fingerprint
from training.evaluation.image_metrics.features import EXTRACTORS
from training.evaluation.observations import Observations

NO_DIVERSITY = {"diversity-captions": None, "diversity-images": None}
BAR = re.compile(r"[\w' ]+: +\d+%\|")  # tqdm's lines on stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return generator_folders(tmp_path_factory.mktemp("generator"))


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without progress bars


@pytest.fixture
def run(capsys, monkeypatch, folders):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: colour_extractor())

    def call(*arguments: object, **changed: object) -> Ran:
        options = {"model": folders["model"], "data": folders["data"], "features": "tiny", "device": "cpu",
                   "diversity-captions": 2, "diversity-images": 2, **changed}
        given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        capsys.readouterr()
        code = tokenloom.main(["evaluate", "generator", *given, *map(str, arguments)])
        shown = capsys.readouterr()
        return Ran(code, shown.out.splitlines(), [line for line in shown.err.splitlines() if line and not BAR.match(line)])
    return call


@pytest.mark.long
def test_the_report_has_what_repeats_it(run, folders, tmp_path):
    options = {"matcher": folders["matcher"], "num-captions": 12, "seed": 4}
    shown = run(out=tmp_path / "a", **options)
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "a")
    assert set(report) == {"command", "schema_version", "metrics", "loss", "generated", "real", "model", "matcher", "data",
                           "options", "device", "versions", "questions"}
    assert list(report["metrics"]) == ["loss", "perplexity", "loss_without_caption", "matcher_score", "retrieval_top1",
                                       "retrieval_top5", "picture_retrieval_top1", "Tiny-FD", "diversity"]
    assert [line.split(":")[0] for line in shown.out] == list(report["metrics"])
    assert report["metrics"]["perplexity"]["value"] == pytest.approx(numpy.exp(report["metrics"]["loss"]["value"]), rel=1e-5)
    assert set(report["real"]) == {"matcher_score", "matcher_score_shuffled", "retrieval"}
    assert report["generated"][0]["sampling"] == SamplingParams(top_k=8, guidance_scale=2.0).plain()
    assert sorted(report["model"]["weights_sha256"]) == ["seq2seq/model.safetensors", "tokenizer_image/model.safetensors"]
    assert report["options"]["seed"] == 4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["contact_sheet.png", "report.json"]
    again = run(out=tmp_path / "b", **options)
    assert again.out == shown.out
    del report["options"]["out"]
    other = report_in(tmp_path / "b")
    del other["options"]["out"]
    assert other == report


@pytest.mark.long
def test_every_guidance_scale_is_measured_on_the_same_captions(run, folders, tmp_path):
    options = {"num-captions": 6, "diversity-captions": 0, "diversity-images": None}
    shown = run("--guidance", "1", "3", out=tmp_path / "out", **options)
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "out")
    assert [each["sampling"]["guidance_scale"] for each in report["generated"]] == [1.0, 3.0]
    assert report["generated"][0]["frechet"]["distance"] != report["generated"][1]["frechet"]["distance"]
    assert sum(line.startswith("guidance 3: Tiny-FD: ") for line in shown.out) == 1
    assert sum(line.startswith("loss: ") for line in shown.out) == 1
    assert Image.open(tmp_path / "out" / "guidance.png").size[0] > 300
    alone = run("--guidance", "3", out=tmp_path / "alone", **options)
    assert alone.code == 0
    assert report_in(tmp_path / "alone")["generated"][0]["frechet"] == report["generated"][1]["frechet"]
    assert list(report["metrics"]) == ["loss", "perplexity", "loss_without_caption"]
    blind = run("--guidance", "1", "3", out=tmp_path / "blind", features="none", **{**NO_DIVERSITY, "num-captions": 6})
    assert (blind.code, len(blind.err)) == (2, 1)
    assert "nothing looks at the pictures" in blind.err[0]


@pytest.mark.long
def test_nearest_split_finds_the_training_picture_of_the_concept(run, tmp_path):
    options = {**NO_DIVERSITY, "features": "none", "num-captions": 12}
    shown = run("--nearest-split", "train", out=tmp_path / "out", **options)
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "out")
    own = report["real"]["caption_accuracy"]
    assert own["accuracy"] == 1.0  # a training picture is nearest to itself
    assert own["captions"] == len(report["questions"]) >= 11
    generated = report["generated"][0]["caption_accuracy"]
    assert generated["accuracy"] < 1.0  # of a model that was never trained
    assert report["metrics"]["caption_accuracy"]["value"] == generated["accuracy"]
    wrong = run("--nearest-split", "trian", out=tmp_path / "wrong", **options)
    assert (wrong.code, len(wrong.err)) == (2, 1)
    assert "trian" in wrong.err[0]


@pytest.mark.long
def test_sampling_options_reach_the_pictures(run, tmp_path):
    options = {"num-captions": 6, "diversity-captions": 0, "diversity-images": None}
    found = {}
    for name, changed in {"own": {}, "cold": {"temperature": 0}, "few": {"top-k": 1}, "sure": {"min-p": 1},
                          "late": {"guidance-schedule": "cosine", "guidance-power": 3}}.items():
        assert run(out=tmp_path / name, **options, **changed).code == 0
        found[name] = report_in(tmp_path / name)["generated"][0]["frechet"]["distance"]
    assert found["cold"] == found["few"] == found["sure"]  # each leaves the likeliest token alone
    assert len({found["own"], found["cold"], found["late"]}) == 3


def test_a_class_model_is_asked_for_its_classes(run, folders, tmp_path):
    classes = ClassLabels.collect([*tiny.CAPTIONS[:15], "broken"])
    tokenizer = tiny.vqgan()
    model = tiny.decoder_only(text_vocab_size=classes.vocab_size, text_length=1,
                              tokenizer_fingerprint=code_fingerprint(tokenizer))
    folder = save_model_folder(tmp_path / "model", tokenizer, model, classes, SamplingParams(), "# classes")
    shown = run(model=folder, out=tmp_path / "out", **{"num-captions": 8})
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "out")
    assert report["model"]["kind"] == "decoder_only"
    assert all(question["caption"] == question["concept"] for question in report["questions"])
    few = ClassLabels.collect(["a red heart", "broken"])
    model = tiny.decoder_only(text_vocab_size=few.vocab_size, text_length=1, tokenizer_fingerprint=code_fingerprint(tokenizer))
    folder = save_model_folder(tmp_path / "few", tokenizer, model, few, SamplingParams(), "# classes")
    shown = run(model=folder, out=tmp_path / "none")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "unknown class" in shown.err[0]


def test_a_reference_takes_the_place_of_the_captions_pictures(run, folders, tmp_path):
    given = {"model": folders["model"], "data": folders["data"], "lpips": "none", "features": "tiny",
             "save-reference": tmp_path / "r.npz", "out": tmp_path / "t"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    assert tokenloom.main(["evaluate", "tokenizer", *words]) == 0
    shown = run(reference=tmp_path / "r.npz", out=tmp_path / "out", **{"num-captions": 6})
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "out")
    found = report["generated"][0]["frechet"]
    assert (found["reference_samples"], found["samples"]) == (ROWS, report["data"]["captions"])
    assert report["data"]["captions"] < ROWS
    assert not found["reference_is_these_pictures"]


@pytest.mark.long
def test_composition_is_checked_on_shapes_data_of_its_own_accord(run, folders, tmp_path):
    data = tmp_path / "shapes"
    assert tokenloom.main(["data", "shapes", "--out", str(data), "--size", "16", "--num-scenes", "20"]) == 0
    shown = run(data=data, out=tmp_path / "out", split="train", features="none", **{**NO_DIVERSITY, "num-captions": 8})
    assert shown.code == 0, shown.err
    report = report_in(tmp_path / "out")
    assert report["real"]["composition"]["all"]["captions"] == 8
    assert report["real"]["composition"]["all"]["share"] >= 0.75  # 16 pixels are few
    assert report["metrics"]["composition"]["value"] == report["generated"][0]["composition"]["all"]["share"]
    off = run("--composition", "no", data=data, out=tmp_path / "off", split="train", features="none",
              **{**NO_DIVERSITY, "num-captions": 8})
    assert off.code == 0
    assert "composition" not in report_in(tmp_path / "off")["metrics"]


def test_pictures_are_those_that_generate_draws(run, folders, tmp_path, monkeypatch):
    observed: list[numpy.ndarray] = []
    add = Observations.add
    monkeypatch.setattr(Observations, "add", lambda self, pixels: (observed.append(pixels.numpy()), add(self, pixels))[1])
    assert run(out=tmp_path / "out", **{"num-captions": 5, "diversity-captions": 0, "diversity-images": None,
                                          "batch-size": 2}).code == 0
    asked = report_in(tmp_path / "out")["questions"]
    drawn = numpy.concatenate(observed)[-len(asked):]  # after the data's own pictures
    model = TextToImage.from_pretrained(folders["model"], "cpu")
    for question, pixels in zip(asked, drawn, strict=True):
        assert (numpy.asarray(model.generate(question["caption"], seed=question["seed"]).images[0]) == pixels).all()


WRONG = [
    ({"num-captions": 1}, "--num-captions 1: give 2 or more"), ({"diversity-captions": 1}, "--diversity-captions 1: give 2"),
    ({"diversity-captions": 0}, "--diversity-images 2: of no captions"), ({"features": "none"}, "--diversity-captions and"),
    ({"layout-column": "classes"}, "--layout-column classes: this model has no"), ({"seed": 2**63 - 9}, "give at most"),
    ({"num-captions": 999}, "--num-captions 999: give 1 to 21"),
    ({"batch-size": 0}, "--batch-size 0"), ({"seed": -1}, "--seed -1: give 0 to"),
    ({"diversity-images": 1}, "--diversity-images 1: give 2 or more"), ({"diversity-captions": -1}, "--diversity-captions -1"),
    ({"top-k": -3}, "top_k"), ({"temperature": "nan"}, "temperature"), ({"guidance": 101}, "guidance_scale"),
    ({"features": "efnet"}, "unknown feature extractor 'efnet'"), ({"features": "inception"}, "needs --inception-weights"),
    ({"matcher": "nowhere"}, "nowhere"), ({"model": "nowhere"}, "nowhere"),
    ({"data": "nowhere"}, "nowhere"),
    ({"split": "tets"}, "tets"), ({"device": "cuda:99"}, "--device cuda:99"), ({"composition": "yes"}, "not of a form of the"),
    ({"reference": "r.npz", "features": "none", **NO_DIVERSITY}, "--reference holds features"),
    ({"reference": "r.npz"}, "no such file"),
    ({"out": ""}, "--out is empty")]


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=[" ".join(map(str, *w[0].items()))[:30] if len(w[0]) == 1 else "two"
                                                           for w in WRONG])
def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, changed, words):
    monkeypatch.chdir(tmp_path)
    shown = run(**{"out": tmp_path / "out", **changed})
    assert shown.code == 2, shown
    assert len(shown.err) == 1, shown.err
    assert words in shown.err[0]
    assert not shown.out
    assert not (tmp_path / "out").exists()


def test_other_peoples_files_are_left_alone(run, folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    shown = run(out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "is not a report of `tokenloom evaluate generator`" in shown.err[0]
    assert (tmp_path / "out" / "report.json").read_text() == "{}"
    shown = run("--guidance", "2", "2", out=tmp_path / "new")
    assert (shown.code, shown.err) == (2, ["tokenloom evaluate: error: --guidance 2 2: names a scale twice"])
