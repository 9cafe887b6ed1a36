"""The training graph of every shape that the serving decoder knows: gradients, saving, padding."""

from __future__ import annotations

import pytest
import torch

from seq2seq import DecoderOnly, TextBatch, load_transformer
from tests import tiny
from tests.decoder_shapes import DECODERS_ONLY, SHAPES, build, left_padded, tokens


def test_blind_text_says_the_same_on_either_side_of_its_padding():
    changes = {**DECODERS_ONLY["llamagen"], "begin_of_image": True}
    model, text = tiny.decoder_only(**changes), build("decoder-only llamagen")[1]
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        right, left = (model(*each, image_tokens).image for each in (text, left_padded(text)))
    assert (right - left).abs().max() < 1e-5
    assert not torch.equal(text.text_input, left_padded(text).text_input)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_gets_a_gradient(shape):
    model, text, layout = build(shape)
    out = model.train()(*text, tokens(model, 4), layout)
    sum(part.square().mean() for part in out if part is not None).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded_models_give_equal_logits(shape, tmp_path):
    model, text, layout = build(shape)
    model.save_pretrained(tmp_path / "m")
    loaded = load_transformer(tmp_path / "m")
    assert type(loaded) is type(model)
    with torch.no_grad():
        ours, theirs = (each(*text, tokens(model, 4), layout) for each in (model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


@pytest.mark.parametrize("shape", SHAPES)
def test_padding_of_captions_changes_nothing_in_any_family(shape):
    model, text, layout = build(shape)
    mask = text.text_mask if text.text_input.ndim == 2 else text.text_mask[..., None]
    scrambled = TextBatch(torch.where(mask, text.text_input, torch.full_like(text.text_input, 3)), text.text_mask)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        ours, theirs = (model(*each, image_tokens, layout).image for each in (text, scrambled))
    slow = slice(1, None) if isinstance(model, DecoderOnly) and not model.begin_of_image_slot else slice(None)
    # without a begin slot the text's last slot, padding or not, predicts token 0 and holds what stands there
    assert torch.equal(ours[:, slow], theirs[:, slow])
    assert model.config.text_length == 1 or not torch.equal(text.text_input, scrambled.text_input)
