"""Metrics of generated pictures, each against one made by hand; the loss on real ones; the questions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from inference import SamplingParams, TextToImage
from inference.layouts import color_layout
from inference.scoring.scorer import ImageTextScorer
from tests import tiny
from tests.evaluation_images import ROWS, colour_extractor, generator_folders
from tokenizer_image.grid import codes_to_tokens
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.data.builders.scenes import COMBINATIONS, describe, draw_scene, make_scene
from training.data.sources.open_dataset import open_dataset
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
    return generator_folders(tmp_path_factory.mktemp("generator"))


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
    scorers = Scorers(extractor=colour_extractor())
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
    certain = diversity(model, asked, 3, SamplingParams(temperature=0.0), colour_extractor(), 8)
    assert certain.within == pytest.approx(0, abs=1e-6)
    varied = diversity(model, asked, 3, SamplingParams(top_k=0), colour_extractor(), 8)
    expected, firsts = [], []
    for question in asked:
        images = model.generate(question.caption, 3, SamplingParams(top_k=0), question.seed).images
        features = [colour_extractor()(torch.from_numpy(numpy.array(i)[None])) for i in images]
        expected += [1 - float(F.cosine_similarity(features[a], features[b])) for a, b in ((0, 1), (0, 2), (1, 2))]
        firsts.append(features[0])
    assert varied.within == pytest.approx(sum(expected) / 6, abs=1e-5)
    assert varied.within > 1e-4
    assert varied.between == pytest.approx(1 - float(F.cosine_similarity(*firsts)), abs=1e-5)
    alike = [asked[0], asked[1]._replace(concept=asked[0].concept)]
    assert diversity(model, alike, 2, SamplingParams(top_k=0), colour_extractor(), 8).between is None
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
