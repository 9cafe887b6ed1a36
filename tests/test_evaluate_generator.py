"""`tokenloom evaluate generator`: each number against one made by hand, and every wrong use in one line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tokenloom
from inference import SamplingParams, TextToImage, save_model_folder
from inference.layouts import color_layout
from inference.scoring.scorer import ImageTextScorer
from seq2seq import ClassLabels
from tests import tiny
from tests.bad_images import corrupt_png
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.data.builders.scenes import COMBINATIONS, describe, draw_scene, make_scene
from training.data.sources.open_dataset import open_dataset
from training.evaluation.features import EXTRACTORS, FeatureExtractor
from training.evaluation.generator import (
    alignment_metrics,
    diversity,
    image_retrieval,
    shuffled,
)
from training.evaluation.observations import Observations
from training.evaluation.questions import Question, choose_questions
from training.evaluation.real_images import measure_real_images
from training.evaluation.scorers import Scorers

ROWS = 20
NO_DIVERSITY = {"diversity-captions": None, "diversity-images": None}
BAR = re.compile(r"[\w' ]+: +\d+%\|")  # tqdm's lines on stderr


class Colours(nn.Module):
    """Mean colour of four quarters: 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * F.adaptive_avg_pool2d(image, 2).flatten(1) + 2


def extractor() -> FeatureExtractor:
    return FeatureExtractor("tiny", "Tiny-FD", 12, "0" * 64, 8, True, Colours())


class ByColour(ImageTextScorer):
    """A picture's mean colour against the colour that a caption names."""

    names: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def _embed_images(self, images):
        means = torch.stack([torch.from_numpy(numpy.asarray(i).copy()).float().mean(dim=(0, 1)) for i in images])
        return F.normalize(means, dim=1)

    def _embed_captions(self, captions):
        return torch.tensor([self.names[caption.split()[0]] for caption in captions])


def plain(*colours: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, 16, 16, 3)


RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def questions(*captions: str) -> list[Question]:
    return [Question(row, caption, caption.split()[0], row) for row, caption in enumerate(captions)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """model; matcher; data: 20 pictures, each with two captions, and one that is damaged; file: somebody's."""
    root = tmp_path_factory.mktemp("generator")
    data = root / "data"
    data.mkdir()
    for number, picture in enumerate(tiny.pictures(ROWS, 20)):
        picture.save(data / f"{number:02}.png")
        (data / f"{number:02}.txt").write_text(f"{tiny.CAPTIONS[number % 15]}\n{tiny.CAPTIONS[number % 15 + 20]}")
    (data / "20.png").write_bytes(corrupt_png())
    (data / "20.txt").write_text("broken")
    (root / "file").write_text("somebody's")
    return {"model": tiny.model_folder(root / "model"), "matcher": tiny.matcher_folder(root / "matcher"), "data": data,
            "file": root / "file", "root": root}


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without progress bars


@pytest.fixture
def run(capsys, monkeypatch, folders):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: extractor())

    def call(*arguments: object, **changed: object) -> Ran:
        options = {"model": folders["model"], "data": folders["data"], "features": "tiny", "device": "cpu",
                   "diversity-captions": 2, "diversity-images": 2, **changed}
        given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        capsys.readouterr()
        code = tokenloom.main(["evaluate", "generator", *given, *map(str, arguments)])
        shown = capsys.readouterr()
        return Ran(code, shown.out.splitlines(), [line for line in shown.err.splitlines() if line and not BAR.match(line)])
    return call


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


# ---- metrics of images ----

def test_scores_and_retrieval_by_hand():
    scorers = Scorers(matcher=ByColour())
    observed = Observations(scorers)
    observed.add(plain(RED, GREEN))
    observed.add(plain(RED, BLUE))  # the third caption asks for green
    found = alignment_metrics(observed, questions("red one", "green one", "green two", "blue one"), scorers, seed=0)
    assert found["matcher_score"] == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert found["retrieval"] == pytest.approx(
        {"concepts": 3, "top1": 0.75, "top5": 1.0, "chance_top1": 1 / 3, "chance_top5": 1})
    others = shuffled(4, 0)
    right = sum(("red", "green", "red", "blue")[place] == ("red", "green", "green", "blue")[other]
                for place, other in enumerate(others))
    assert found["matcher_score_shuffled"] == pytest.approx(right / 4)


def test_a_tie_is_no_success():
    class Blind(ByColour):
        def _embed_images(self, images):
            return torch.full((len(images), 3), 3**-0.5)

    scorers = Scorers(matcher=Blind())
    observed = Observations(scorers)
    observed.add(plain(RED, GREEN))
    assert alignment_metrics(observed, questions("red one", "green one"), scorers, 0)["retrieval"]["top1"] == 0


def test_a_matcher_that_gives_no_numbers_is_no_success_either():
    class Broken(ByColour):
        def _embed_images(self, images):
            return torch.full((len(images), 3), torch.nan)

    scorers = Scorers(matcher=Broken())
    observed = Observations(scorers)
    observed.add(plain(RED, GREEN))
    with pytest.raises(RunFailedError, match="not finite"):
        alignment_metrics(observed, questions("red one", "green one"), scorers, 0)


def test_concepts_that_differ_in_case_are_one():
    scorers = Scorers(matcher=ByColour())
    observed = Observations(scorers)
    observed.add(plain(RED, RED, GREEN))
    asked = [Question(0, "red a", "Red", 0), Question(1, "red b", "red", 1), Question(2, "green a", "green", 2)]
    assert alignment_metrics(observed, asked, scorers, 0)["retrieval"]["top1"] == 1


@pytest.mark.parametrize("count", [2, 3, 50])
def test_shuffled_gives_every_place_another_one(count):
    places = shuffled(count, 7)
    assert sorted(places) == list(range(count))
    assert all(place != other for place, other in enumerate(places))
    assert places == shuffled(count, 7)


def test_the_nearest_real_picture_decides_picture_retrieval():
    scorers = Scorers(extractor=extractor())
    real, drawn = Observations(scorers), Observations(scorers)
    real.add(plain(RED, (240, 20, 20), GREEN, BLUE))
    drawn.add(plain((230, 30, 30), RED, (20, 20, 240), BLUE))
    asked = questions("red a", "red b", "green a", "blue a")
    assert image_retrieval(drawn, real, asked) == {"top1": 0.75, "chance": (4 + 1 + 1) / 16}
    assert image_retrieval(real, real, asked)["top1"] == 1


def scenes(count: int) -> tuple[torch.Tensor, list[str]]:
    made = [make_scene(random.Random(f"scene {number}"), COMBINATIONS, 3) for number in range(count)]
    return torch.from_numpy(numpy.stack([draw_scene(scene, 32) for scene in made])), [describe(scene)[0] for scene in made]


def test_composition_is_right_on_drawn_scenes_and_at_chance_with_other_captions():
    scorers = Scorers(reads_scenes=True)
    observed = Observations(scorers)
    pixels, captions = scenes(150)
    observed.add(pixels)
    found = alignment_metrics(observed, questions(*captions), scorers, seed=1)
    assert found["composition"]["all"] == {"share": 1.0, "captions": 150}
    assert found["composition_shuffled"]["all"]["share"] < 0.02
    # by chance, of seven colours and six shapes: the colours of a single thing agree in a seventh of cases at most
    assert found["composition_shuffled"]["color"]["share"] < 0.15
    assert found["composition_shuffled"]["shape"]["share"] < 0.2
    assert found["composition_shuffled"]["relation"]["share"] < 0.3


def test_diversity_is_nothing_without_chance_and_what_the_features_say_with_it(folders):
    model = TextToImage.from_pretrained(folders["model"], "cpu")
    asked = [Question(0, "a red heart", "a red heart", 5), Question(1, "a blue circle", "a blue circle", 9)]
    certain = diversity(model, asked, 3, SamplingParams(temperature=0.0), extractor(), 8)
    assert certain.within == pytest.approx(0, abs=1e-6)
    varied = diversity(model, asked, 3, SamplingParams(top_k=0), extractor(), 8)
    expected, firsts = [], []
    for question in asked:
        images = model.generate(question.caption, 3, SamplingParams(top_k=0), question.seed).images
        features = [extractor()(torch.from_numpy(numpy.array(i)[None])) for i in images]
        expected += [1 - float(F.cosine_similarity(features[a], features[b])) for a, b in ((0, 1), (0, 2), (1, 2))]
        firsts.append(features[0])
    assert varied.within == pytest.approx(sum(expected) / 6, abs=1e-5)
    assert varied.within > 1e-4
    assert varied.between == pytest.approx(1 - float(F.cosine_similarity(*firsts)), abs=1e-5)
    alike = [asked[0], asked[1]._replace(concept=asked[0].concept)]
    assert diversity(model, alike, 2, SamplingParams(top_k=0), extractor(), 8).between is None
    assert [caption for caption, _ in varied.shown] == ["a red heart", "a blue circle"]


# ---- the loss on the data's own pictures ----

def test_the_loss_is_that_of_the_pictures_own_tokens(folders):
    model, source = TextToImage.from_pretrained(folders["model"], "cpu"), open_dataset(folders["data"])
    asked = choose_questions(source, None, 3, first_caption=False)
    real = measure_real_images(model, source, asked, Scorers(), 7, "layout")
    sums, without = [], []
    for question in real.questions:
        pixels = torch.from_numpy(image_to_pixels(source[question.row].image, 16))[None]
        tokens = codes_to_tokens(model.image_tokenizer.encode(pixels_to_float(pixels)))
        own, none = model.text_tokenizer.encode([question.caption]), model.text_tokenizer.null_caption()
        for text, into in ((own, sums), (none, without)):
            with torch.no_grad():
                into.append(-model.seq2seq(*text, tokens).image.log_softmax(-1)[0].gather(1, tokens[0][:, None])[:, 0])
    assert real.loss.loss == pytest.approx(float(torch.stack(sums).mean()), abs=1e-5)
    assert real.loss.loss_without_caption == pytest.approx(float(torch.stack(without).mean()), abs=1e-5)
    assert real.loss.by_position == pytest.approx(torch.stack(sums).mean(dim=0).tolist(), abs=1e-5)
    assert real.loss.loss != pytest.approx(real.loss.loss_without_caption, abs=1e-4)
    assert len(real.questions) == ROWS
    assert real.unusable.total() == 1


def test_a_model_with_layouts_is_measured_with_the_pictures_own(tmp_path, folders):
    layout = {"layout_kind": "colors", "layout_classes": 27, "layout_grid": (2, 2)}
    model = TextToImage.from_pretrained(tiny.model_folder(tmp_path / "model", **layout), "cpu")
    source = open_dataset(folders["data"])
    question, other = [asked for asked in choose_questions(source, None, 0, True) if asked.caption != "broken"][:2]
    real = measure_real_images(model, source, [question, other], Scorers(), 4, "layout")
    losses = []
    for asked in (question, other):
        square = image_to_pixels(source[asked.row].image, 16)
        tokens = codes_to_tokens(model.image_tokenizer.encode(pixels_to_float(torch.from_numpy(square)[None])))
        own = torch.from_numpy(color_layout(Image.fromarray(square), (2, 2)))[None]
        with torch.no_grad():
            for layout, into in ((own, losses), ((own + 1) % 27, [])):
                logits = model.seq2seq(*model.text_tokenizer.encode([asked.caption]), tokens, layout).image
                into.append(float(F.cross_entropy(logits[0], tokens[0])))
        assert into[0] != pytest.approx(losses[-1], abs=1e-3)  # the layout tells
    assert real.loss.loss == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_a_single_picture_is_too_few(folders):
    model, source = TextToImage.from_pretrained(folders["model"], "cpu"), open_dataset(folders["data"])
    broken = next(row for row in range(len(source)) if source.captions(row) == ["broken"])
    asked = [Question(0, "a", "a", 0), Question(broken, "b", "b", 1)]
    with pytest.raises(DataError, match="1 usable pictures to measure"):
        measure_real_images(model, source, asked, Scorers(), 4, "layout")


# ---- questions ----

def test_questions_are_a_seeded_sample_with_captions_of_their_rows(folders):
    source = open_dataset(folders["data"])
    asked = choose_questions(source, 8, 5, first_caption=False)
    assert asked == choose_questions(source, 8, 5, False) != choose_questions(source, 8, 6, False)
    assert [question.seed for question in asked] == list(range(5, 13))
    rows = [question.row for question in asked]
    assert len(set(rows)) == 8
    assert rows != sorted(rows)  # what stands together in the data does not stand together here
    assert all(q.caption in source.captions(q.row) and q.concept == source.captions(q.row)[0] for q in asked)
    assert any(question.caption != question.concept for question in asked)
    assert all(question.caption == question.concept for question in choose_questions(source, 8, 5, True))
    with pytest.raises(UserError, match="--num-captions 99: give 1 to"):
        choose_questions(source, 99, 0, False)


# ---- the command ----

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
