"""The serving graph against the training graph, step by step, in float and in 8 bits."""

from __future__ import annotations

import pytest
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import MatmulStrategy
from inference.decoder.slots import SharedSlots
from seq2seq import TextBatch, load_transformer
from tests.decoder_shapes import (
    SHAPES,
    STRATEGIES,
    build,
    cached_logits,
    cached_with,
    left_padded,
    prefilled,
    tokens,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_uncached_at_every_step(shape, strategy):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        expected = model(*text, image_tokens, layout).image
    assert expected.shape == (4, model.config.num_tokens, model.config.codebook_size)
    assert (cached_logits(model, text, image_tokens, layout=layout, strategy=strategy) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only llamagen", "decoder-only layout",
                                   "decoder-only grouped-query-column", "decoder-only dalle-masked"])
def test_padding_on_the_left_gives_equal_logits_at_every_step_and_gradients(shape, strategy):
    """The first slots of a caption see nothing but themselves."""
    model, text, layout = build(shape)
    text, image_tokens = left_padded(text), tokens(model, 4)
    expected = model(*text, image_tokens, layout).image
    assert (cached_logits(model, text, image_tokens, layout=layout, strategy=strategy) - expected).abs().max() < 1e-4
    model = build(shape)[0].train()
    model(*text, image_tokens, layout).image.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_no_slot_of_a_caption_is_without_anything_to_see():
    """A softmax over nothing is no number on some devices, and a hidden slot's value times 0 would be none either."""
    model, text, _ = build("decoder-only llamagen")
    cache = CachedDecoder(model).rows_cache(4)
    cache.seen[:, : model.text_slots] = left_padded(text).text_mask
    pattern = model.decoder.layers[0][1].attend.pattern
    mask = SharedSlots(cache, 0, model.text_slots, None).mask(pattern)[:, 0]  # [R, T, T]
    own = torch.eye(model.text_slots, dtype=torch.bool)
    assert mask[:, own].isfinite().all()
    assert not mask[1, -1].isfinite().all()
    later = SharedSlots(cache, 2, 3, None).mask(pattern)
    assert torch.equal(later[:, 0], mask[:, 2:5, :5])


@pytest.mark.parametrize("shape", [name for name in SHAPES if "layout" in name])
def test_layout_logits_one_at_a_time_equal_all_at_once(shape):
    model, text, layout = build(shape)
    with torch.no_grad():
        expected = model(*text, tokens(model, 4), layout).layout
    decoder = CachedDecoder(model)
    groups = [decoder.prefill(text, 1)]
    cache = decoder.new_cache(groups)
    logits = decoder.decode_layout(layout[:, :0], 0, groups, cache)
    for position in range(model.config.layout_tokens):
        assert (logits - expected[:, position]).abs().max() < 1e-4
        logits = decoder.decode_layout(layout[:, position: position + 1], position, groups, cache)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_at_positions_of_their_own_equal_the_training_graph(shape, strategy):
    """Windows of two tokens; row r is r tokens behind the others' place, as in a queue."""
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        expected = model(*text, image_tokens, layout).image
    decoder = CachedDecoder(model, matmul=STRATEGIES[strategy])
    groups, cache = prefilled(decoder, text, layout)
    before = torch.cat([torch.full((4, 1), decoder.begin), image_tokens], dim=1)
    total, first = model.config.num_tokens, decoder.first_position
    if first == 1:
        assert (decoder.first_logits(groups) - expected[:, 0]).abs().max() < 1e-4
    late = torch.arange(4)
    for step in range(first, total + 3):
        positions = ((step - late).clamp(first, total - 2)[:, None] + torch.arange(2))  # [4, 2]
        logits = decoder.decode_at(before.gather(1, positions), positions, groups, cache, int(positions.max()) + 1)
        wanted = expected.gather(1, positions[..., None].expand(-1, -1, expected.shape[-1]))
        assert (logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only dalle"])
def test_what_later_slots_of_the_cache_hold_is_not_seen(shape, strategy):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model, matmul=STRATEGIES[strategy])
    groups = [decoder.prefill(text, 1)]
    cache = decoder.new_cache(groups)
    cache.keys[:, :, :, model.prefix_slots:] = 1e9
    cache.values[:, :, :, model.prefix_slots:] = 1e9
    first = decoder.first_position
    previous, positions = torch.full((4, 1), decoder.begin if first == 0 else 3), torch.full((4, 1), first)
    fresh = decoder.decode_at(previous, positions, groups, decoder.new_cache(groups))
    for end in (None, first + 1, first + 5):
        assert (decoder.decode_at(previous, positions, groups, cache, end) - fresh).abs().max() < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_computes_the_same_after_the_decoder_took_its_weights_over(shape, tmp_path):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(*text, image_tokens, layout).image
        for strategy in (MatmulStrategy("columns"), MatmulStrategy("rows", True), MatmulStrategy("rows", False, 3),
                         STRATEGIES["native"]):
            decoder = CachedDecoder(model, matmul=strategy)
            assert (model(*text, image_tokens, layout).image - before).abs().max() < 1e-5
            model.decoder.layers[0][1].to_q.weight.mul_(1.5)  # shared, not copied
            changed = model(*text, image_tokens, layout).image
            assert (cached_with(decoder, text, image_tokens, layout) - changed).abs().max() < 1e-4
            one = TextBatch(*(part[:1] for part in text))
            alone = cached_with(decoder, one, image_tokens[:1], None if layout is None else layout[:1])
            assert (alone - changed[:1]).abs().max() < 1e-4
            model.decoder.layers[0][1].to_q.weight.div_(1.5)
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert (load_transformer(tmp_path / "m")(*text, image_tokens, layout).image - before).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_logits_stay_near_and_equal_their_own_training_graph(shape):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        exact = model(*text, image_tokens, layout).image
        decoder = CachedDecoder(model, int8=True)
        rounded = model(*text, image_tokens, layout).image  # weights rounded, inputs not
    cached = cached_with(decoder, text, image_tokens, layout)
    assert (rounded - exact).abs().max() > 1e-5
    assert (rounded - exact).abs().mean() < 0.03 * exact.std()
    assert (cached - rounded).abs().mean() < 0.05 * exact.std()
    matrices = sum(p.numel() for p in model.decoder.parameters() if p.ndim == 2)
    assert matrices == 0  # all of them are 8-bit buffers now


def test_an_eight_bit_row_does_not_depend_on_its_neighbours():
    model, _, _ = build("encoder-decoder default")
    decoder = CachedDecoder(model, int8=True)
    projection = decoder.layers[0][0].qkv
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 1e-3, 0.0, 7.0])[:, None]
    together = projection(x)
    assert torch.equal(together, torch.cat([projection(row[None]) for row in x]))
    assert torch.isfinite(together).all()
    weights = decoder.layers[0][0].qkv.matrix * decoder.layers[0][0].qkv.scale[:, None]
    assert (together - x @ weights.t()).abs().amax(dim=1).le(0.02 * x.abs().amax(dim=1) * weights.abs().sum(dim=1).max()).all()
