"""Losses of the transformer by hand on a few numbers."""

from __future__ import annotations

import math

import pytest
import torch

from seq2seq import TokenLogits
from seq2seq.losses import TokenLossConfig, loss_parts, token_loss, z_loss

LOGITS = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
TARGETS = torch.tensor([[0, 1]])
FIRST, SECOND = math.log(2), math.log(1 + math.exp(2))


def test_plain_weighted_and_smoothed_cross_entropy():
    assert float(token_loss(LOGITS, TARGETS)) == pytest.approx((FIRST + SECOND) / 2)
    assert float(token_loss(LOGITS, TARGETS, torch.tensor([[1.0, 3.0]]))) == pytest.approx((FIRST + 3 * SECOND) / 4)
    assert float(token_loss(LOGITS, TARGETS, torch.tensor([[0.0, 0.0]]))) == 0
    smooth = 0.9 * SECOND + 0.1 * ((SECOND - 2) + SECOND) / 2  # the other class's cross entropy is 2 lower
    assert float(token_loss(LOGITS, TARGETS, label_smoothing=0.1)) == pytest.approx((FIRST + smooth) / 2)


def test_z_loss_is_the_square_of_the_log_normaliser():
    assert float(z_loss(LOGITS)) == pytest.approx((math.log(2) ** 2 + math.log(1 + math.exp(2)) ** 2) / 2)


def test_each_part_has_its_weight_and_defaults_are_the_plain_loss():
    plain = loss_parts(TokenLogits(LOGITS), TokenLossConfig(), TARGETS)
    assert list(plain) == ["image"]
    assert float(plain["image"][0]) == float(token_loss(LOGITS, TARGETS))
    assert plain["image"][1] == 1.0
    config = TokenLossConfig(image_weight=7 / 8, text_weight=1 / 8, layout_weight=0.5, z_weight=1e-4)
    parts = loss_parts(TokenLogits(LOGITS, LOGITS * 2, LOGITS * 3), config, TARGETS, None, TARGETS, TARGETS,
                       torch.tensor([[True, False]]))
    assert {name: weight for name, (_, weight) in parts.items()} == {"image": 7 / 8, "text": 1 / 8, "layout": 0.5, "z": 1e-4}
    assert float(parts["text"][0]) == pytest.approx(math.log(2))  # padding does not count
    assert float(parts["layout"][0]) == pytest.approx(float(token_loss(LOGITS * 2, TARGETS)))
