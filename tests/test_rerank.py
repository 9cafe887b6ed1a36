"""The best of several candidates, in the eyes of a matcher."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import tokenloom
from inference import LoadedModel, SamplingParams, TextToImage
from tests import tiny
from tokenloom_common.errors import UserError

# ---- reranking ----

class Redness:
    """Scores a picture by its mean red, or the other way round for a caption with 'blue'."""

    def scores(self, images, captions):
        red = torch.tensor([float(numpy.asarray(image)[..., 0].mean()) for image in images])
        return torch.stack([-red if "blue" in caption else red for caption in captions], dim=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.matcher_folder(tmp_path_factory.mktemp("matchers") / "m")


def test_reranking_keeps_the_best_candidates_with_their_seeds(model_folder):
    model = TextToImage.from_pretrained(model_folder, device="cpu")
    prompts = ["heart", "blue"]
    everything = model.generate(prompts, num_images=6, seed=3)
    kept = model.generate(prompts, num_images=2, seed=3, rerank_from=6, matcher=Redness())
    red = Redness().scores(everything.images, prompts)
    for prompt in range(2):
        own = red[6 * prompt: 6 * prompt + 6, prompt]
        best = own.argsort(descending=True)[:2]
        rows = slice(2 * prompt, 2 * prompt + 2)
        assert kept.seeds[rows] == [3 + int(i) for i in best]
        assert kept.scores[rows] == own[best].tolist()
        assert torch.equal(kept.image_tokens[rows], everything.image_tokens[6 * prompt + best])
        assert [i.tobytes() for i in kept.images[rows]] == [everything.images[6 * prompt + int(i)].tobytes() for i in best]
        for image, seed in zip(kept.images[rows], kept.seeds[rows], strict=True):
            assert model.generate(prompts[prompt], seed=seed).images[0].tobytes() == image.tobytes()
    assert kept.prompts == [prompts[0]] * 2 + [prompts[1]] * 2
    assert everything.scores is None
    assert kept.attention_overlay("blue", 3).size == (16, 16)


def test_reranking_all_candidates_only_orders_them_and_equal_scores_keep_theirs(model_folder):
    model = TextToImage.from_pretrained(model_folder, device="cpu")
    assert sorted(model.generate("octopus", num_images=3, rerank_from=3, matcher=Redness()).seeds) == [0, 1, 2]

    class Indifferent:
        def scores(self, images, captions):
            return torch.zeros(len(images), len(captions))

    assert model.generate("octopus", num_images=2, rerank_from=4, matcher=Indifferent()).seeds == [0, 1]


@pytest.mark.long
def test_layouts_follow_their_pictures():
    text = tiny.text_tokenizer()
    parts = tiny.seq2seq(text_vocab_size=text.vocab_size, layout_kind="colors", layout_classes=27, layout_grid=(2, 2))
    model = TextToImage(LoadedModel(tiny.vqgan(), parts, text, SamplingParams(), Path()), Redness())
    everything = model.generate("octopus", num_images=4)
    kept = model.generate("octopus", num_images=2, rerank_from=4)
    assert torch.equal(kept.layouts, everything.layouts[kept.seeds])


def test_a_matcher_of_ours_reranks_by_its_folder(model_folder, folder):
    model = TextToImage.from_pretrained(model_folder, device="cpu", matcher=folder)
    result = model.generate("a red heart", num_images=2, rerank_from=5)
    scores = model.matcher.scores(model.generate("a red heart", num_images=5).images, ["a red heart"])[:, 0]
    assert result.scores == pytest.approx(scores.sort(descending=True).values[:2].tolist(), abs=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    ({"rerank_from": 4}, "needs a matcher to choose"),
    ({"rerank_from": 4, "matcher": "m"}, "got str; load one with load_matcher"),
    ({"num_images": 3, "rerank_from": 2, "matcher": Redness()}, "at least num_images 3, got 2"),
    ({"rerank_from": 2.0, "matcher": Redness()}, "at least num_images 1, got 2.0"),
    ({"num_images": 0, "rerank_from": 2, "matcher": Redness()}, "num_images"),
    ({"matcher": Redness()}, "say how many with rerank_from")])
def test_impossible_reranking_is_refused(model_folder, options, words):
    with pytest.raises(UserError, match=words):
        TextToImage.from_pretrained(model_folder, device="cpu").generate("a red heart", **options)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.full((3, 1), math.nan)])
def test_a_scorer_that_gives_no_number_a_picture_is_refused(model_folder, scores):
    class Broken:
        def scores(self, images, captions):
            return scores

    with pytest.raises(UserError, match=r"expected \[3, 1\], all finite"):
        TextToImage.from_pretrained(model_folder, device="cpu").generate("octopus", rerank_from=3, matcher=Broken())


def test_the_command_line_reranks(model_folder, folder, tmp_path, capsys):
    code = tokenloom.main(["generate", "a red heart", "--model", str(model_folder), "--matcher", str(folder), "--rerank-from",
                           "5", "--num-images", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert code == 0
    paths = capsys.readouterr().out.split()
    result = TextToImage.from_pretrained(model_folder, device="cpu", matcher=folder).generate(
        "a red heart", num_images=2, rerank_from=5)
    for path, seed, score in zip(paths, result.seeds, result.scores, strict=False):
        assert path.endswith(f"seed{seed}.png")
        with Image.open(path) as image:
            said = json.loads(image.info["tokenloom"])
        assert said["score"] == pytest.approx(score, abs=1e-6)
        assert said["matcher"] == str(folder)
    for wrong, words in ((["--rerank-from", "5"], "belong together"), (["--matcher", str(folder)], "belong together"),
                         (["--rerank-from", "1", "--num-images", "2", "--matcher", str(folder)], "at least num_images 2")):
        assert tokenloom.main(["generate", "x", "--model", str(model_folder), "--out", str(tmp_path / "no"), *wrong]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
