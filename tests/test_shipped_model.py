"""The model that ships: small, licensed, and it draws what it is asked for, straight after installing."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image

from inference import SamplingParams, TextToImage
from inference.shipped import SHIPPED_MODELS, default_model_folder
from tokenloom_common.errors import MissingFileError
from tokenloom_common.weights import read_tensors
from training.data.builders.emoji_packages import STYLES

LIMIT = 20 * 1024 * 1024  # of all that ships, so that cloning and installing stay quick


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained(default_model_folder(), "cpu")


def test_all_models_that_ship_take_at_most_20_mib():
    files = [path for path in SHIPPED_MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT


def test_its_weights_are_stored_in_16_bits():
    for part in ("seq2seq", "tokenizer_image"):
        tensors = read_tensors(default_model_folder() / part)
        wide = [name for name, tensor in tensors.items() if tensor.dtype in (torch.float32, torch.float64)]
        assert wide == [], part


def test_its_card_says_licence_authors_and_figures():
    folder = default_model_folder()
    card = (folder / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "cc-by-4.0"
    for words in ("caption accuracy", "dB", "training/recipes/shipped_seq2seq.yaml", "ATTRIBUTION.md"):
        assert words in card
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name, style in STYLES.items():
        assert (style.package.name in attribution) is not style.share_alike, name
        if not style.share_alike:
            assert style.package.licence in attribution


def test_an_installation_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("inference.shipped.SHIPPED_MODELS", tmp_path)
    with pytest.raises(MissingFileError, match="the model that ships with Tokenloom is not there"):
        default_model_folder()


def mean_ink(images: list[Image.Image]) -> numpy.ndarray:
    """Mean RGB of the pixels that are not paper."""
    pixels = numpy.stack([numpy.asarray(image) for image in images]).reshape(-1, 3).astype(float)
    return pixels[pixels.min(axis=1) < 200].mean(axis=0)


@pytest.mark.long
@pytest.mark.parametrize(("caption", "strongest"), [("red heart", 0), ("green heart", 1), ("blue heart", 2),
                                                    ("red circle", 0), ("green square", 1)])
def test_it_draws_the_colour_that_a_caption_names(model, caption, strongest):
    params = SamplingParams.parse({**model.default_params.plain(), "temperature": 0.7}, "test")
    ink = mean_ink(model.generate(caption, num_images=4, params=params, seed=0).images)
    assert ink.argmax() == strongest, (caption, ink)


@pytest.mark.long
def test_from_pretrained_without_arguments_is_the_same_model(model):
    default = TextToImage.from_pretrained()
    assert Path(default.parts.folder) == default_model_folder()
    tokens = default.sample_tokens("octopus", seed=3)
    assert torch.equal(tokens, model.sample_tokens("octopus", seed=3))
    assert not torch.equal(tokens, model.sample_tokens("rocket", seed=3))
