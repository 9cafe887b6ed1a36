"""The serving graph's promises about batches, seeds and guidance."""

from __future__ import annotations

import pytest
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Request
from inference.generation.ways import generate_tokens as generate_request
from inference.sampling import SamplingParams, guide
from seq2seq import TextBatch
from tests import tiny
from tests.decoder_shapes import SHAPES, build, cached_logits, caption, tokens


@pytest.fixture(scope="module")
def text():
    """Captions of different lengths, so that padding matters."""
    return tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree", "", "octopus"])


def generate_tokens(decoder, captions, null, images, params, seeds):
    return generate_request(decoder, Request(captions, null, images, params, seeds))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_a_caption_and_guidance_in_one_batch_equal_separate_calls(shape):
    model, text, layout = build(shape)
    two, null = caption(text, slice(0, 2)), caption(text, slice(2, 3))
    image_tokens = tokens(model, 6)
    twice = None if layout is None else layout[:1].expand(12, -1)
    decoder = CachedDecoder(model)
    groups = [decoder.prefill(two, 3), decoder.prefill(null, 6)]
    cache = decoder.new_cache(groups)
    if layout is not None:
        decoder.decode_layout(twice, 0, groups, cache)
    with torch.no_grad():
        expected = [model(*TextBatch(*(part.repeat_interleave(count, dim=0) for part in each)), image_tokens,
                          None if layout is None else twice[:6]).image for each, count in ((two, 3), (null, 6))]
    for position in range(model.config.num_tokens):
        previous = None if position == 0 else image_tokens[:, position - 1].repeat(2)
        both = decoder.decode_one(previous, position, groups, cache)
        assert (both - torch.cat([part[:, position] for part in expected])).abs().max() < 1e-4


def test_padding_of_captions_changes_nothing(text):
    model = tiny.seq2seq()
    image_tokens = tokens(model, 4)
    scrambled = TextBatch(torch.where(text.text_mask, text.text_input, 17), text.text_mask)
    assert torch.equal(cached_logits(model, text, image_tokens), cached_logits(model, scrambled, image_tokens))
    assert not torch.equal(text.text_input, scrambled.text_input)


def test_batch_of_four_equals_four_singles(text):
    model = tiny.seq2seq()
    image_tokens = tokens(model, 4)
    together = cached_logits(model, text, image_tokens)
    for row in range(4):
        alone = cached_logits(model, caption(text, slice(row, row + 1)), image_tokens[row: row + 1])
        assert (together[row: row + 1] - alone).abs().max() < 1e-4


def test_images_of_one_caption_from_one_prefill_equal_prefills_of_each(text):
    model = tiny.seq2seq(kv_heads=1)
    two = caption(text, slice(0, 2))
    image_tokens = tokens(model, 6)
    shared = cached_logits(model, two, image_tokens, images=3)
    repeated = TextBatch(*(part.repeat_interleave(3, dim=0) for part in two))
    assert (shared - cached_logits(model, repeated, image_tokens)).abs().max() < 1e-4


def test_guidance_in_one_batch_equals_two_calls(text):
    model = tiny.seq2seq()
    null = caption(text, slice(2, 3))
    captions = caption(text, slice(0, 2))
    image_tokens = tokens(model, 4)
    decoder = CachedDecoder(model)
    groups = [decoder.prefill(captions, 2), decoder.prefill(null, 4)]
    cache = decoder.new_cache(groups)
    with torch.no_grad():
        conditional = cached_logits(model, captions, image_tokens, images=2)
        unconditional = cached_logits(model, null, image_tokens, images=4)
    for position in range(model.config.num_tokens):
        previous = None if position == 0 else image_tokens[:, position - 1].repeat(2)
        both = decoder.decode_one(previous, position, groups, cache)
        expected = guide(conditional[:, position], unconditional[:, position], 3.0)
        assert (guide(*both.chunk(2), 3.0) - expected).abs().max() < 1e-4


def test_guidance_scale_one_equals_conditional_only_and_runs_no_second_branch(text, monkeypatch):
    model = tiny.seq2seq()
    captions, null = caption(text, slice(0, 2)), caption(text, slice(2, 3))
    rows_seen = []
    original = CachedDecoder.decode_one

    def counting(self, previous, position, groups, cache):
        rows_seen.append(sum(group.rows for group in groups))
        return original(self, previous, position, groups, cache)

    monkeypatch.setattr(CachedDecoder, "decode_one", counting)
    params = {"top_k": 8, "temperature": 1.0}
    plain = generate_tokens(CachedDecoder(model), captions, null, 2, SamplingParams(guidance_scale=1.0, **params), [0, 1, 0, 1])
    assert set(rows_seen) == {4}
    close = generate_tokens(CachedDecoder(model), captions, null, 2, SamplingParams(guidance_scale=1.0 + 1e-9, **params),
                            [0, 1, 0, 1])
    assert torch.equal(plain, close)
    assert set(rows_seen) == {4, 8}


def test_greedy_tokens_equal_the_training_graphs(text):
    model = tiny.seq2seq()
    captions, null = caption(text, slice(0, 2)), caption(text, slice(2, 3))
    greedy = SamplingParams(temperature=0, guidance_scale=1.0, top_k=0)
    drawn = generate_tokens(CachedDecoder(model), captions, null, 1, greedy, [0, 1])
    so_far = torch.empty(2, 0, dtype=torch.int64)
    with torch.no_grad():
        memory = model.encode_text(*captions)
        for _ in range(model.config.num_tokens):
            step = model.decode(memory, captions.text_mask, so_far).image[:, -1]
            so_far = torch.cat([so_far, step.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(drawn, so_far)


def test_the_same_seed_gives_the_same_tokens_whatever_shares_the_batch(text):
    model = tiny.seq2seq()
    null = caption(text, slice(2, 3))
    params = SamplingParams(guidance_scale=2.0, top_k=16)
    decoder = CachedDecoder(model)
    alone = generate_tokens(decoder, caption(text, slice(0, 1)), null, 1, params, [5])
    shared = generate_tokens(decoder, caption(text, slice(0, 4)), null, 2, params, [5, 6] * 4)
    assert torch.equal(alone[0], shared[0])
    assert not torch.equal(shared[0], shared[1])


def test_tokens_depend_on_the_caption(text):
    model = tiny.seq2seq()
    params = SamplingParams(temperature=0, guidance_scale=1.0)
    null = caption(text, slice(2, 3))
    drawn = generate_tokens(CachedDecoder(model), text, null, 1, params, [0] * 4)
    assert len(set(map(tuple, drawn.tolist()))) > 1


def test_an_impossible_code_cannot_be_sampled(text):
    model = tiny.seq2seq()
    params = SamplingParams(temperature=5.0, top_k=0, guidance_scale=1.0)
    drawn = generate_tokens(CachedDecoder(model), text, caption(text, slice(2, 3)), 4, params, list(range(16)))
    assert drawn.min() >= 0
    assert drawn.max() < model.config.codebook_size
    assert len(drawn.unique()) > 20


def test_guidance_that_ends_early_stops_paying_for_the_second_branch(text, monkeypatch):
    model = tiny.seq2seq()
    rows_seen = []
    original = CachedDecoder.decode_one
    monkeypatch.setattr(CachedDecoder, "decode_one", lambda self, previous, position, groups, cache: (
        rows_seen.append(cache.row_count), original(self, previous, position, groups, cache))[1])
    params = {"top_k": 8, "guidance_scale": 3.0}
    captions, null = caption(text, slice(0, 2)), caption(text, slice(2, 3))
    whole = generate_tokens(CachedDecoder(model), captions, null, 2, SamplingParams(**params), [0, 1, 2, 3])
    assert rows_seen == [8] * 16
    rows_seen.clear()
    short = generate_tokens(CachedDecoder(model), captions, null, 2, SamplingParams(guidance_end=0.3, **params), [0, 1, 2, 3])
    assert rows_seen == [8] * 5 + [4] * 11
    assert torch.equal(whole[:, :5], short[:, :5])
    assert not torch.equal(whole, short)
