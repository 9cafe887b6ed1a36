"""The serving graph against the training graph, and the promises about batches, seeds and guidance."""

from __future__ import annotations

import pytest
import torch

from inference.decoder import CachedDecoder
from inference.generate import decode_steps, generate_tokens
from inference.sampling import SamplingParams, guide
from seq2seq import TextBatch
from tests import tiny

SHAPES = {
    "default": {},
    "grouped-query": {"kv_heads": 1},
    "rotary-1d": {"rotary": "1d"},
    "learned-only": {"rotary": "none"},
    "rotary-only": {"learned_positions": False},
    "gelu-layernorm": {"feedforward": "gelu", "norm": "layernorm", "qk_norm": False, "feedforward_multiplier": 4.0},
    "one-head": {"heads": 1, "head_dim": 32},
    "wide-grid": {"grid": (2, 5)},
}


@pytest.fixture(scope="module")
def text():
    """Captions of different lengths, so that padding matters."""
    return tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree", "", "octopus"])


def tokens(model, rows: int, seed: int = 0) -> torch.Tensor:
    config = model.config
    return torch.randint(0, config.codebook_size, (rows, config.num_tokens), generator=torch.Generator().manual_seed(seed))


def caption(text: TextBatch, rows: slice) -> TextBatch:
    return TextBatch(text.text_ids[rows], text.text_mask[rows])


def cached_logits(model, text, image_tokens, images: int = 1) -> torch.Tensor:
    decoder = CachedDecoder(model)
    groups = [decoder.prefill(text, images)]
    cache = decoder.new_cache(len(image_tokens))
    steps = [decoder.decode_one(None if i == 0 else image_tokens[:, i - 1], i, groups, cache)
             for i in range(model.config.num_tokens)]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_uncached_at_every_step(shape, text):
    model = tiny.seq2seq(**SHAPES[shape])
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        expected = model(*text, image_tokens)
    assert (cached_logits(model, text, image_tokens) - expected).abs().max() < 1e-4


def test_padding_of_captions_changes_nothing(text):
    model = tiny.seq2seq()
    image_tokens = tokens(model, 4)
    scrambled = TextBatch(torch.where(text.text_mask, text.text_ids, 17), text.text_mask)
    assert torch.equal(cached_logits(model, text, image_tokens), cached_logits(model, scrambled, image_tokens))
    assert not torch.equal(text.text_ids, scrambled.text_ids)


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
    cache = decoder.new_cache(8)
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
            step = model.decode(memory, captions.text_mask, so_far)[:, -1]
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
    drawn = list(decode_steps(CachedDecoder(model), text, null, 1, params, [0] * 4))
    assert len(set(map(tuple, torch.stack(drawn, dim=1).tolist()))) > 1


def test_an_impossible_code_cannot_be_sampled(text):
    model = tiny.seq2seq()
    params = SamplingParams(temperature=5.0, top_k=0, guidance_scale=1.0)
    drawn = generate_tokens(CachedDecoder(model), text, caption(text, slice(2, 3)), 4, params, list(range(16)))
    assert drawn.min() >= 0
    assert drawn.max() < model.config.codebook_size
    assert len(drawn.unique()) > 20
