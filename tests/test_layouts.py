"""Layouts: colours of a picture, classes of the data, in token shards, in sampling, and as weights of the loss."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Generation, Request
from inference.generation.ways import generate_tokens
from inference.layouts import COLOR_LEVELS, color_layout, read_layout
from inference.sampling import SamplingParams
from seq2seq.losses import region_token_weights
from tests import tiny
from tokenloom_common.errors import DataError, UserError
from training.data.tokens.layouts import downsample_classes
from training.data.tokens.shards import (
    LayoutIndex,
    SplitIndex,
    TokenIndex,
    TokenShards,
    write_index,
    write_shard,
)

GRID = (2, 3)
LAYOUT = {"layout_kind": "colors", "layout_classes": 27, "layout_grid": GRID}
SHARP = SamplingParams(top_k=4, guidance_scale=2.0)


def color_picture(layout: torch.Tensor, grid: tuple[int, int], side: int) -> Image.Image:
    """Show a colour layout [L] as an image of side x side pixels, for people to look at."""
    red = layout // COLOR_LEVELS**2
    green = layout // COLOR_LEVELS % COLOR_LEVELS
    blue = layout % COLOR_LEVELS
    levels = torch.stack([red, green, blue], dim=-1).reshape(*grid, 3)
    pixels = (levels * 255 // (COLOR_LEVELS - 1)).to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def model():
    return tiny.seq2seq(**LAYOUT)


def request(model, layout=None, seeds=(0, 1, 2)):
    text = tiny.text_tokenizer()
    return Request(text.encode(["a red heart"]), text.null_caption(), len(seeds), SHARP, list(seeds), layout)


def test_a_pictures_colors_are_its_layout_and_the_layout_is_a_picture():
    image = Image.new("RGB", (60, 40), "white")
    image.paste((250, 10, 5), (0, 0, 20, 20))
    image.paste((0, 120, 255), (40, 20, 60, 40))
    layout = color_layout(image, GRID)
    assert layout.tolist() == [18, 26, 26, 26, 26, 5]  # red 2,0,0; white 2,2,2; blue 0,1,2
    shown = color_picture(torch.from_numpy(layout), GRID, 60)
    assert shown.getpixel((10, 10)) == (255, 0, 0)
    assert shown.getpixel((50, 50)) == (0, 127, 255)
    assert color_layout(shown, GRID).tolist() == layout.tolist()


def test_a_coarser_layout_takes_the_class_in_the_middle():
    fine = numpy.arange(16)
    assert downsample_classes(fine, (2, 2), 16, "k").tolist() == [5, 7, 13, 15]
    assert downsample_classes(fine, (4, 4), 16, "k").tolist() == fine.tolist()


@pytest.mark.parametrize(("values", "words"), [
    (numpy.arange(15), "square grid"), (numpy.arange(16) / 2, "whole numbers"), (numpy.arange(16) + 1, "0 to 15"),
    (numpy.arange(0), "square grid")])
def test_impossible_layouts_of_the_data_are_named(values, words):
    with pytest.raises(DataError, match=words):
        downsample_classes(values, (2, 2), 16, "row 7")


def test_a_given_layout_is_kept_and_changes_the_picture(model):
    decoder = CachedDecoder(model)
    given = torch.randint(0, 27, (3, 6), generator=torch.Generator().manual_seed(0))
    tokens, layout = generate_tokens(decoder, request(model, given))
    assert torch.equal(layout, given)
    others, _ = generate_tokens(decoder, request(model, given.flip(1)))
    assert not torch.equal(tokens, others)


def test_giving_the_layout_that_was_sampled_gives_the_same_tokens(model):
    decoder = CachedDecoder(model)
    tokens, sampled = generate_tokens(decoder, request(model))
    assert sampled.shape == (3, 6)
    assert len(set(map(tuple, sampled.tolist()))) > 1
    again, _ = generate_tokens(decoder, request(model, sampled))
    assert torch.equal(tokens, again)


def test_a_layout_of_one_seed_does_not_depend_on_its_batch(model):
    decoder = CachedDecoder(model)
    alone = Generation(decoder, request(model, seeds=(1,)))
    list(alone.steps())
    assert torch.equal(alone.layout[0], generate_tokens(decoder, request(model))[1][1])


def test_what_a_caller_may_give(model):
    config = model.config
    assert read_layout(None, config, 2) is None
    assert read_layout([[0, 1, 2], [3, 4, 5]], config, 2).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert read_layout(torch.arange(12).reshape(2, 6), config, 2).tolist() == [list(range(6)), list(range(6, 12))]
    white = Image.new("RGB", (8, 8), "white")
    assert read_layout(white, config, 1).tolist() == [[26] * 6]


@pytest.mark.parametrize(("given", "words"), [
    ([1.5] * 6, "whole numbers"), ([0] * 5, "reads 2 x 3"), ([0, 0, 0, 0, 0, 27], "0 to 26"), ([-1] * 6, "0 to 26"),
    ("red", "whole numbers|must be a picture"), ([[0], [0, 1]], "must be a picture"), ([True] * 6, "whole numbers")])
def test_what_a_caller_may_not_give(model, given, words):
    with pytest.raises(UserError, match=words):
        read_layout(given, model.config, 2)


def test_a_layout_for_a_model_without_or_of_another_kind_is_refused():
    with pytest.raises(UserError, match="trained without layouts"):
        read_layout([0] * 6, tiny.seq2seq().config, 1)
    classes = tiny.seq2seq(layout_kind="classes", layout_classes=5, layout_grid=GRID).config
    with pytest.raises(UserError, match="not colours"):
        read_layout(Image.new("RGB", (4, 4)), classes, 1)


def test_token_shards_keep_layouts(tmp_path):
    tokens = numpy.zeros((2, 16), dtype=numpy.uint16)
    layouts = numpy.arange(12, dtype=numpy.uint16).reshape(2, 6)
    file = write_shard(tmp_path / "train-00000-of-00001.arrow", [["a"], ["b"]], tokens, ["k0", "k1"], layouts)

    def index(classes: int) -> None:
        write_index(tmp_path, TokenIndex(
            tokenizer_fingerprint="f", codebook_size=32, grid=(4, 4), layout=LayoutIndex(kind="colors", classes=classes,
                                                                                         grid=GRID),
            splits={"train": SplitIndex(rows=2, files=[file])}))

    index(27)
    assert TokenShards(tmp_path, "train").layout(1).tolist() == [6, 7, 8, 9, 10, 11]
    index(11)
    with pytest.raises(UserError, match="layout hold 11, which is outside the classes of 11"):
        TokenShards(tmp_path, "train")


def test_region_weights_lie_where_the_classes_lie():
    layout = torch.tensor([[0, 1, 0, 2]])  # 2 x 2
    weights = region_token_weights(layout, (2, 2), (4, 4), {1: 5.0, 2: 0.0}).reshape(4, 4)
    assert weights.tolist() == [[1, 1, 5, 5]] * 2 + [[1, 1, 0, 0]] * 2
