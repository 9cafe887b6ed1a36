"""Sizes by name: parameters counted without allocating any, and that each preset is a model."""

from __future__ import annotations

import pytest
import torch

from seq2seq import PRESETS, TRANSFORMER_KINDS
from training.config.transformer import read_settings

PARTI = {"text_vocab_size": 16_000, "text_length": 128, "codebook_size": 8192, "grid": (32, 32)}
CLASSES = {"text_vocab_size": 1001, "text_length": 1, "codebook_size": 16_384, "grid": (16, 16)}
SMALL = {"text_vocab_size": 512, "text_length": 12, "codebook_size": 512, "grid": (8, 8)}


def parameters(name: str, derived: dict) -> int:
    config = read_settings({"preset": name}).build(derived)
    with torch.device("meta"):
        return sum(p.numel() for p in TRANSFORMER_KINDS[config.kind](config).parameters())


@pytest.mark.long
@pytest.mark.parametrize(("name", "millions"), [
    ("parti-350m", 385), ("parti-750m", 788), ("parti-3b", 3086), ("parti-20b", 20_534)])
def test_parti_has_the_published_sizes(name, millions):
    """Counted for the paper's table 1 with an ungated feed-forward, one text embedding, and separate image ones."""
    assert parameters(name, PARTI) // 1_000_000 == millions


@pytest.mark.parametrize(("name", "count"), [
    ("b", 110_888_448), ("l", 342_910_976), ("xl", 774_699_520), ("xxl", 1_410_972_672), ("xxxl", 3_893_027_840),
    ("1b", 1_199_616_000), ("3b", 3_096_659_200), ("7b", 6_614_589_440)])
def test_class_conditional_llamagen_has_the_published_sizes(name, count):
    assert parameters(f"llamagen-{name}", CLASSES) == count


def test_captioned_llamagen_xl_has_the_published_size():
    """LlamaGen's features of 120 x 2048; its null caption is a buffer there, not a parameter."""
    assert parameters("llamagen-xl", {**CLASSES, "text_vocab_size": None, "text_feature_width": 2048,
                                      "text_length": 120}) == 777_678_080


@pytest.mark.long
@pytest.mark.parametrize(("name", "derived", "low", "high"), [
    ("dalle", {"text_vocab_size": 16_384, "text_length": 256, "codebook_size": 8192, "grid": (32, 32)}, 12.0e9, 12.4e9),
    ("rudalle-malevich", {"text_vocab_size": 16_384, "text_length": 128, "codebook_size": 8192, "grid": (32, 32)},
     1.30e9, 1.32e9),
    ("mindalle", {"text_vocab_size": 16_384, "text_length": 64, "codebook_size": 16_384, "grid": (16, 16)}, 1.28e9, 1.30e9),
    ("dalle-mini", {"text_vocab_size": 50_264, "text_length": 64, "codebook_size": 16_385, "grid": (16, 16)}, 0.435e9, 0.440e9),
    ("dalle-mega", {"text_vocab_size": 50_272, "text_length": 64, "codebook_size": 16_416, "grid": (16, 16)}, 2.58e9, 2.60e9)])
def test_other_published_models_have_about_their_published_sizes(name, derived, low, high):
    """Published to two or three digits: 12 B, 1.31 B, 1.29 B, 437 M, 2.59 B."""
    assert low < parameters(name, derived) < high


@pytest.mark.long
@pytest.mark.parametrize(("name", "count"), [
    ("debug", 282_492), ("debug-decoder", 249_276), ("emoji-demo", 6_184_184), ("small", 70_112_756),
    ("small-decoder", 63_811_912), ("parti-350m-modern", 328_921_088), ("parti-750m-modern", 656_162_816),
    ("parti-3b-modern", 2_558_132_224), ("parti-20b-modern", 16_910_872_576)])
def test_our_own_sizes(name, count):
    assert parameters(name, PARTI if "modern" in name else SMALL) == count


def test_every_preset_is_counted_here():
    counted = {"debug", "debug-decoder", "emoji-demo", "small", "small-decoder", "dalle", "rudalle-malevich", "mindalle",
               "dalle-mini", "dalle-mega"} | {f"llamagen-{s}" for s in ("b", "l", "xl", "xxl", "xxxl", "1b", "3b", "7b")} | {
               f"parti-{s}{m}" for s in ("350m", "750m", "3b", "20b") for m in ("", "-modern")}
    assert set(PRESETS) == counted


def test_dalle_alternates_rows_and_columns_and_ends_in_a_convolution():
    """Column attention where (layer - 2) % 4 = 0, the first layer being 1; the convolution in the last layer only."""
    names = read_settings({"preset": "dalle"}).build(CLASSES).patterns(64)
    expected = ["column" if (layer - 2) % 4 == 0 else "row" for layer in range(1, 65)]
    assert names == [*expected[:-1], "convolution"]
