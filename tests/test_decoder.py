"""The serving graph against the training graph, and the promises about batches, seeds and guidance."""

from __future__ import annotations

import pytest
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.projection import Way
from inference.decoder.slots import SharedSlots
from inference.generation.batch import Request
from inference.generation.ways import generate_tokens as generate_request
from inference.sampling import SamplingParams, guide
from seq2seq import DecoderOnly, TextBatch, load_transformer
from tests import tiny

ENCODER_DECODERS = {
    "default": {},
    "grouped-query": {"kv_heads": 1},
    "rotary-1d": {"rotary": "1d"},
    "learned-only": {"rotary": "none"},
    "rotary-only": {"learned_positions": False},
    "gelu-layernorm": {"feedforward": "gelu", "norm": "layernorm", "qk_norm": False, "feedforward_multiplier": 4.0},
    "one-head": {"heads": 1, "head_dim": 32},
    "wide-grid": {"grid": (2, 5)},
    "convolution": {"attention": ("convolution",), "convolution_size": 3},
    "normformer": {"norm_placement": "normformer", "norm": "layernorm", "embedding_norm": True, "image_positions": "flat",
                   "rotary": "none", "feedforward": "geglu", "feedforward_bias": False},
    "bart-norms": {"norm_placement": "normformer", "norm": "layernorm", "norm_bias": True, "norm_eps": 3e-3,
                   "embedding_norm": True, "feedforward": "geglu", "kv_heads": 1},
    "layout": {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3)},
    "features": {"text_vocab_size": None, "text_feature_width": 6, "encoder_layers": 0},
}
DECODERS_ONLY = {
    "default": {},
    "dalle": {"predict_text": True, "text_padding": "learned", "begin_of_image": False, "rotary": "none",
              "attention": ("row", "column", "row"), "last_attention": "convolution", "convolution_size": 3},
    "dalle-masked": {"predict_text": True, "begin_of_image": False, "rotary": "none", "attention_bias": True},
    "llamagen": {"text_positions": "blind", "begin_of_image": False, "learned_positions": False, "qk_norm": False,
                 "feedforward_bias": False, "text_projection": "mlp", "text_vocab_size": None, "text_feature_width": 6,
                 "norm_eps": 3e-3},  # beside a mean square of about 0.01, so that one that is ignored is seen
    "sandwich": {"norm_placement": "sandwich", "norm": "layernorm", "rotary": "1d"},
    "biased-norms": {"norm_placement": "sandwich", "norm": "layernorm", "norm_bias": True, "qk_norm": False},
    "grouped-query-column": {"kv_heads": 1, "attention": ("column",), "grid": (3, 5)},
    "layout": {"layout_kind": "classes", "layout_classes": 5, "layout_grid": (2, 3), "attention": ("row", "full")},
    "one-slot": {"text_vocab_size": 7, "text_length": 1},
}
SHAPES = {f"{name} {shape}": (family, changes) for name, family, shapes in (
    ("encoder-decoder", tiny.seq2seq, ENCODER_DECODERS), ("decoder-only", tiny.decoder_only, DECODERS_ONLY))
    for shape, changes in shapes.items()}


def build(shape: str):
    """The model, four captions' input and mask of different lengths, and layouts (None where it has none)."""
    family, changes = SHAPES[shape]
    model = family(**changes)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    real = torch.tensor([config.text_length, max(1, config.text_length // 2), 1, min(2, config.text_length)])
    mask = torch.arange(config.text_length) < real[:, None]
    if config.text_feature_width:
        given = torch.randn(4, config.text_length, config.text_feature_width, generator=generator)
    else:
        given = torch.randint(4, config.text_vocab_size, (4, config.text_length), generator=generator)
    layout = (torch.randint(0, config.layout_classes, (4, config.layout_tokens), generator=generator)
              if config.layout_grid else None)
    return model, TextBatch(given, mask), layout


@pytest.fixture(scope="module")
def text():
    """Captions of different lengths, so that padding matters."""
    return tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree", "", "octopus"])


def generate_tokens(decoder, captions, null, images, params, seeds):
    return generate_request(decoder, Request(captions, null, images, params, seeds))[0]


def tokens(model, rows: int, seed: int = 0) -> torch.Tensor:
    config = model.config
    return torch.randint(0, config.codebook_size, (rows, config.num_tokens), generator=torch.Generator().manual_seed(seed))


def caption(text: TextBatch, rows: slice) -> TextBatch:
    return TextBatch(text.text_input[rows], text.text_mask[rows])


WAYS = {"torch": Way(), "native": Way(native_to=64)}


def cached_logits(model, text, image_tokens, images: int = 1, layout=None, way: str = "torch") -> torch.Tensor:
    return cached_with(CachedDecoder(model, way=WAYS[way]), text, image_tokens, layout, images)


def cached_with(decoder, text, image_tokens, layout=None, images: int = 1) -> torch.Tensor:
    groups, cache = begun(decoder, text, layout, images)
    steps = [decoder.decode_one(None if i == 0 else image_tokens[:, i - 1], i, groups, cache)
             for i in range(image_tokens.shape[1])]
    return torch.stack(steps, dim=1)


def begun(decoder, text, layout, images: int = 1):
    """Caption memories and a cache, the layout in it."""
    groups = [decoder.prefill(text, images)]
    cache = decoder.new_cache(groups)
    if layout is not None:
        decoder.decode_layout(layout, 0, groups, cache)
    return groups, cache


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_uncached_at_every_step(shape, way):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        expected = model(*text, image_tokens, layout).image
    assert expected.shape == (4, model.config.num_tokens, model.config.codebook_size)
    assert (cached_logits(model, text, image_tokens, layout=layout, way=way) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


def left_padded(text: TextBatch) -> TextBatch:
    """The same captions with their padding in front."""
    rolled = [[part.roll(int((~mask).sum()), dims=0) for part in (given, mask)] for given, mask in zip(*text, strict=True)]
    return TextBatch(*(torch.stack(parts) for parts in zip(*rolled, strict=True)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only llamagen", "decoder-only layout",
                                   "decoder-only grouped-query-column", "decoder-only dalle-masked"])
def test_padding_on_the_left_gives_equal_logits_at_every_step_and_gradients(shape, way):
    """The first slots of a caption see nothing but themselves."""
    model, text, layout = build(shape)
    text, image_tokens = left_padded(text), tokens(model, 4)
    expected = model(*text, image_tokens, layout).image
    assert (cached_logits(model, text, image_tokens, layout=layout, way=way) - expected).abs().max() < 1e-4
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


def test_blind_text_says_the_same_on_either_side_of_its_padding():
    changes = {**DECODERS_ONLY["llamagen"], "begin_of_image": True}
    model, text = tiny.decoder_only(**changes), build("decoder-only llamagen")[1]
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        right, left = (model(*each, image_tokens).image for each in (text, left_padded(text)))
    assert (right - left).abs().max() < 1e-5
    assert not torch.equal(text.text_input, left_padded(text).text_input)


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_at_positions_of_their_own_equal_the_training_graph(shape, way):
    """Windows of two tokens; row r is r tokens behind the others' place, as in a queue."""
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    with torch.no_grad():
        expected = model(*text, image_tokens, layout).image
    decoder = CachedDecoder(model, way=WAYS[way])
    groups, cache = begun(decoder, text, layout)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only dalle"])
def test_what_later_slots_of_the_cache_hold_is_not_seen(shape, way):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model, way=WAYS[way])
    groups = [decoder.prefill(text, 1)]
    cache = decoder.new_cache(groups)
    cache.keys[:, :, :, model.prefix_slots:] = 1e9
    cache.values[:, :, :, model.prefix_slots:] = 1e9
    first = decoder.first_position
    previous, positions = torch.full((4, 1), decoder.begin if first == 0 else 3), torch.full((4, 1), first)
    fresh = decoder.decode_at(previous, positions, groups, decoder.new_cache(groups))
    for end in (None, first + 1, first + 5):
        assert (decoder.decode_at(previous, positions, groups, cache, end) - fresh).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_computes_the_same_after_the_decoder_took_its_weights_over(shape, tmp_path):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(*text, image_tokens, layout).image
        for way in (Way("columns"), Way("rows", True), Way("rows", False, 3), WAYS["native"]):
            decoder = CachedDecoder(model, way=way)
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
