"""The peers of `benchmarks decode` on tiny models: what they draw, that they do our work, that other work is seen."""

import json
import sys

import pytest
import torch

from benchmarks import harness
from benchmarks.attention import relative_gap
from benchmarks.decode import peers as decode_peers
from benchmarks.decode import reference as decode_reference
from benchmarks.decode.reference import TOLERANCE, make_model, make_work
from benchmarks.peers.x_transformers_sampler import XTransformersPeer
from seq2seq.layers import PatternAttend
from seq2seq.presets import PRESETS
from tests.test_benchmarks import threads_as_before  # noqa: F401
from tokenloom_common.errors import UserError

TINY = {"text_vocab_size": 64, "text_length": 12, "codebook_size": 32, "grid": (4, 4), "width": 32, "heads": 2, "head_dim": 16,
        "encoder_layers": 1, "decoder_layers": 2}
FLAT = {**TINY, "rotary": "none", "image_positions": "flat"}
BART = {**FLAT, **{key: PRESETS["dalle-mini"][key] for key in ("feedforward", "feedforward_bias", "norm", "qk_norm",
                                                               "norm_placement", "embedding_norm")}}
MINI = {**PRESETS["dalle-mini"], **TINY, "decoder_layers": 1, "text_length": 64, "codebook_size": 2**14, "grid": (16, 16)}
MINI.pop("kind")


def built(config, peer, pictures=2, tokens=16, guidance=1.0):
    model = make_model(config, "cpu", "float32")
    runner = decode_peers.make_peer(peer, model)
    return model, runner, decode_peers.peer_work(runner, model, pictures, tokens, guidance)


# ---- the work

def test_captions_are_of_many_lengths_and_the_unguided_one_has_no_words():
    work = make_work(make_model(FLAT, "cpu", "float32"), captions=5, images=2, tokens=16, guidance=3.0)
    ids, mask = work.captions
    assert work.pictures == 10
    assert mask.sum(dim=1).tolist() == [12, 10, 7, 4, 2]
    assert torch.equal(ids == decode_reference.PAD_ID, ~mask)
    for row, real in zip(ids, mask.sum(dim=1), strict=True):
        assert (row[0], row[real - 1]) == (decode_reference.BEGIN_ID, decode_reference.END_ID)
        assert bool((row[1: real - 1] > decode_reference.END_ID).all())
    alone = make_work(make_model(FLAT, "cpu", "float32"), captions=1, images=1, tokens=16, guidance=1.0)
    assert alone.captions.text_mask.sum() == 9
    assert work.unguided.text_input.tolist() == [[0, 2, *[1] * 10]]
    assert work.unguided.text_mask.tolist() == [[True, True, *[False] * 10]]
    rows = work.row_text
    assert torch.equal(rows.text_input, torch.cat([ids.repeat_interleave(2, 0), work.unguided.text_input.expand(10, -1)]))
    assert torch.equal(rows.text_mask[:10], mask.repeat_interleave(2, 0))
    assert len(work._replace(guidance=1.0).row_text.text_mask) == 10


@pytest.mark.parametrize(("change", "tokens", "message"), [
    ({}, 17, "tokens 17 must be between 1 and the grid's 16"), ({}, 0, "tokens 0 must be"),
    ({"text_length": 1}, 16, "at least 2 of at least 4 text ids; the model reads 1 of 64"),
    ({"text_vocab_size": 3}, 16, "the model reads 12 of 3")])
def test_work_that_cannot_be_is_refused(change, tokens, message):
    with pytest.raises(ValueError, match=message):
        make_work(make_model({**FLAT, **change}, "cpu", "float32"), 1, 1, tokens, 1.0)


def test_shortfall_is_the_worst_tokens_share_of_the_largest_logit():
    logits = torch.tensor([[[1.0, 4.0], [3.0, 2.0]]])  # [B 1, s 2, K 2]
    assert decode_reference.shortfall(logits, torch.tensor([[1, 0]])) == 0
    assert decode_reference.shortfall(logits, torch.tensor([[1, 1]])) == 0.25
    assert decode_reference.shortfall(logits * torch.nan, torch.tensor([[1, 0]])) == float("inf")


@pytest.mark.parametrize(("tokens", "are"), [([[0, 3]], True), ([[0, 4]], False), ([[-1, 3]], False), ([[0, 1, 2]], False),
                                             ([[0.0, 1.0]], False)])
def test_codes_are_whole_numbers_below_k(tokens, are):
    assert decode_reference.are_codes(torch.tensor(tokens), (1, 2), 4) == are


def test_guided_logits_lead_away_from_the_second_half():
    logits = torch.tensor([[2.0], [1.0]])
    assert decode_reference.guided(logits, 3.0).tolist() == [[4.0]]
    assert decode_reference.guided(logits, 1.0).tolist() == [[2.0], [1.0]]


# ---- x-transformers

@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("config", "guidance"), [
    (FLAT, 1.0), (FLAT, 3.0), ({**TINY, "rotary": "1d", "learned_positions": False}, 1.0),
    ({**TINY, "rotary": "1d", "kv_heads": 1}, 1.0), (BART, 1.0), ({**FLAT, "attention_bias": True}, 1.0)])
def test_x_transformers_loop_has_our_logits_and_our_likeliest_tokens(config, guidance, cached):
    peer = "x-transformers" if cached else "x-transformers, no cache"
    _, runner, work = built(config, peer, pictures=3, tokens=16, guidance=guidance)
    row = runner.verify(work)
    assert row["ok"]
    assert row["greedy_equal_share"] == 1
    assert max(row["logits_gap"], row["greedy_shortfall"]) < 1e-5
    assert (row["pictures"], row["tokens"], row["guidance"]) == (3, 16, guidance)


def test_x_transformers_attends_with_its_own_attention_and_draws_every_row():
    model, runner, work = built(FLAT, "x-transformers", pictures=3, tokens=7, guidance=3.0)
    assert any(isinstance(module, PatternAttend) for module in model.modules())
    assert not any(isinstance(module, PatternAttend) for module in runner.wrapper.modules())
    attends = [module.attend for module in runner.wrapper.modules() if hasattr(module, "to_q")]
    assert [(type(attend).__name__, attend.flash, attend.causal) for attend in attends] \
        == [("Attend", True, True), ("Attend", True, False)] * 2
    torch.manual_seed(0)
    tokens = runner.sample(work)
    assert tokens.shape == (6, 7)
    assert not torch.equal(tokens[3], tokens[4])  # drawn, though both read the unguided caption


def test_x_transformers_draws_among_the_k_likeliest(monkeypatch):
    monkeypatch.setattr("benchmarks.peers.x_transformers_sampler.TOP_K", 1)
    _, runner, work = built(FLAT, "x-transformers", pictures=3)
    assert torch.equal(runner.sample(work), runner.greedy(work))


@pytest.mark.parametrize(("cached", "inputs"), [(True, [1, 1, 1, 1]), (False, [1, 2, 3, 4])])
def test_the_cache_is_used_only_where_it_is_said_to_be(cached, inputs):
    runner = XTransformersPeer(make_model(FLAT, "cpu", "float32"), cached)
    seen = []
    first = next(module for module in runner.wrapper.modules() if hasattr(module, "to_q"))
    first.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    runner.sample(make_work(runner.model, 2, 1, 4, 1.0))
    assert seen == inputs


def other_begin(wrapper):
    wrapper.net.token_emb.emb.weight[-1] += 0.1


def late_positions(wrapper):
    wrapper.net.pos_emb.emb.weight.copy_(wrapper.net.pos_emb.emb.weight.roll(1, 0))


@pytest.mark.parametrize("fault", [other_begin, late_positions])
def test_x_transformers_with_other_weights_is_refused(fault):
    _, runner, work = built(FLAT, "x-transformers")
    fault(runner.wrapper)
    row = runner.verify(work)
    assert row["logits_gap"] > TOLERANCE
    assert not row["ok"]


def test_x_transformers_that_ignores_the_captions_padding_is_refused(monkeypatch):
    _, runner, work = built(FLAT, "x-transformers")
    generate = runner.wrapper.generate
    monkeypatch.setattr(runner.wrapper, "generate", lambda *given, context_mask, **options: generate(*given, **options))
    assert not runner.verify(work)["ok"]


def test_ids_outside_the_codebook_and_unlikely_ones_are_refused(monkeypatch):
    _, runner, work = built(FLAT, "x-transformers")
    monkeypatch.setattr(runner, "sample", lambda work: torch.full((2, 16), 32))
    row = runner.verify(work)
    assert not row["drawn_ok"]
    assert not row["ok"]
    _, runner, work = built(FLAT, "x-transformers")
    monkeypatch.setattr(runner, "greedy", lambda work: torch.zeros(2, 16, dtype=torch.int64))
    row = runner.verify(work)
    assert row["greedy_shortfall"] > TOLERANCE
    assert not row["ok"]


@pytest.mark.parametrize(("change", "message"), [
    ({"rotary": "2d"}, "rotary '2d'; use 1d or none"), ({"attention": ("row",)}, "attention .*; use full"),
    ({"last_attention": "convolution"}, "use full"),
    ({"layout_kind": "classes", "layout_classes": 4, "layout_grid": (2, 2)}, "a layout")])
def test_models_that_x_transformers_cannot_express_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        XTransformersPeer(make_model({**FLAT, **change}, "cpu", "float32"))


# ---- transformers

@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_caches_of_transformers_draw_the_same_codes(guidance):
    pytest.importorskip("transformers")
    drawn = []
    for name in ("transformers", "transformers, static cache"):
        _, runner, work = built(FLAT, name, pictures=2, tokens=9, guidance=guidance)
        assert runner.verify(work)["ok"]
        torch.manual_seed(1)
        drawn.append(runner.sample(work))
    assert drawn[0].shape == (2 if guidance == 1 else 4, 9)
    assert len(drawn[0].unique()) > 4
    assert torch.equal(*drawn)


def test_transformers_gets_the_cache_and_attention_that_are_asked_for(monkeypatch):
    pytest.importorskip("transformers")
    for name, kind in (("transformers", "DynamicLayer"), ("transformers, static cache", "StaticLayer")):
        _, runner, work = built(FLAT, name)
        seen, inputs = set(), []

        def note(_, args, options, seen=seen, inputs=inputs):
            seen.add(type(options["past_key_values"].self_attention_cache.layers[0]).__name__)
            inputs.append((args[0] if args else options["input_ids"]).shape[1])

        runner.bart.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        runner.sample(work)
        assert seen == {kind}
        assert inputs == [1] * 16
        assert runner.bart.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="cache 'paged': expected one of dynamic, static"):
        type(runner)(runner.model, "paged")


def test_transformers_reads_each_rows_caption():
    pytest.importorskip("transformers")
    _, runner, work = built(FLAT, "transformers", pictures=1)
    seen = []
    runner.bart.get_decoder().register_forward_pre_hook(
        lambda _, args, options: seen.append((options["encoder_hidden_states"], options["encoder_attention_mask"])),
        with_kwargs=True)
    runner.sample(work._replace(guidance=3.0))
    memory, mask = seen[0]
    rows = work._replace(guidance=3.0).row_text
    assert torch.equal(memory, runner.model.encode_text(*rows))
    assert torch.equal(mask.bool(), rows.text_mask) or mask.shape[-1] == 12  # as given, or made into an attention mask


def test_no_code_ends_what_transformers_draws():
    pytest.importorskip("transformers")
    _, runner, work = built({**FLAT, "codebook_size": 4}, "transformers", pictures=1)
    torch.manual_seed(0)
    tokens = runner.sample(work)
    assert tokens.shape == (1, 16)
    assert len(tokens[:, :12].unique()) == 4


@pytest.mark.parametrize("change", [{}, {"kv_heads": 1}, {"feedforward_multiplier": 4.0, "feedforward": "gelu"}])
def test_barts_layers_are_as_large_as_ours(change):
    pytest.importorskip("transformers")
    model, runner, _ = built({**FLAT, **change}, "transformers")
    assert runner.our_layer_parameters == sum(part.numel() for part in model.decoder.parameters())
    assert abs(runner.layer_parameters - runner.our_layer_parameters) <= 2 * (2 * 32 + 1)
    with pytest.raises(ValueError, match="3 heads do not divide width 32"):
        built({**FLAT, "heads": 3}, "transformers")


# ---- min-dalle

@pytest.fixture(scope="module")
def mini():
    if (reason := decode_peers.missing("min-dalle")) is not None:  # importorskip would leave gradients off and threads changed
        pytest.skip(reason)
    from benchmarks.peers.min_dalle import MinDallePeer

    return MinDallePeer(make_model(MINI, "cpu", "float32"))


def test_min_dalles_import_leaves_the_process_as_it_was(mini, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "min_dalle"]:
        monkeypatch.delitem(sys.modules, name)
    torch.set_num_threads(1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # what the import sets
    assert decode_peers.missing("min-dalle") is None
    assert "min_dalle" in sys.modules
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 1


@pytest.mark.long
def test_min_dalles_loop_has_our_logits(mini):
    work = decode_peers.peer_work(mini, mini.model, 2, 256, 16.0)
    forced = decode_reference.random_tokens(work, 2, 2**14)
    theirs = mini.forced(work, forced)
    assert theirs.shape == (4, 256, 2**14)
    ours = decode_reference.forced_logits(mini.model, work, forced.repeat(2, 1))
    assert relative_gap(ours, theirs) < 1e-5
    norm = mini.loop.decoder.layers[0].encoder_attn_layer_norm.weight
    kept = norm.clone()
    norm.copy_(mini.loop.decoder.layers[0].self_attn_layer_norm.weight)
    wrong = relative_gap(ours, mini.forced(work, forced))
    norm.copy_(kept)
    assert wrong > TOLERANCE


def test_min_dalles_norms_take_our_biases_over(mini):
    model = make_model({**MINI, "norm_bias": True, "norm_eps": 1e-5}, "cpu", "float32")
    biased = type(mini)(model)
    theirs, ours = biased.loop.decoder.layers[0].glu.ln1, model.decoder.layers[0 + 2][1].ff[1]
    x = torch.randn(3, len(ours.weight))
    assert ours.bias.abs().max() > 0.1
    torch.testing.assert_close(theirs(x), ours(x))
    work = decode_peers.peer_work(biased, model, 1, 32, 4.0)
    assert torch.equal(biased.sample(work, top_k=1), decode_reference.greedy_ids(model, work))


@pytest.mark.long
def test_min_dalle_draws_as_we_do_where_only_the_likeliest_is_left(mini):
    work = decode_peers.peer_work(mini, mini.model, 1, 256, 4.0)
    assert torch.equal(mini.sample(work, top_k=1), decode_reference.greedy_ids(mini.model, work))


@pytest.mark.slow
def test_min_dalle_does_the_same_work(mini):
    row = mini.verify(decode_peers.peer_work(mini, mini.model, 3, 256, 3.0))
    assert row["ok"]
    assert row["greedy_equal_share"] == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"text_length": 32}, "text_length 64, the model has 32"), ({"codebook_size": 2**13}, "codebook_size 16384"),
    ({"norm": "rmsnorm"}, "norm layernorm, the model has rmsnorm"), ({"heads": 1}, "1 heads of 16, width 32"),
    ({"kv_heads": 1}, "kv_heads 1"), ({"norm_eps": 1e-6}, "norm_eps 1e-5, the model has 1e-06")])
def test_models_that_min_dalle_cannot_be_are_refused(mini, change, message):
    with pytest.raises(ValueError, match=message):
        built({**MINI, **change}, "min-dalle")


def test_min_dalle_refuses_another_beginning_and_other_work(mini):
    model = make_model(MINI, "cpu", "float32")
    model.begin_of_image[0] += 1
    with pytest.raises(ValueError, match="begins with the last code"):
        type(mini)(model)
    work = decode_peers.peer_work(mini, mini.model, 1, 256, 3.0)
    two = make_work(mini.model, 2, 1, 256, 3.0)
    for wrong in (two, work._replace(guidance=1.0), work._replace(tokens=16)):
        with pytest.raises(ValueError, match="min-dalle draws tokens of one caption with guidance"):
            mini.sample(wrong)
    longer = work.unguided._replace(text_mask=work.unguided.text_mask | True)
    with pytest.raises(ValueError, match="the first and the last id"):
        mini.sample(work._replace(unguided=longer))


# ---- the table

@pytest.mark.long
def test_every_peer_draws_through_its_case():
    for name in decode_peers.PEERS:
        if decode_peers.missing(name) is not None:
            continue
        assert decode_peers.peer_version(name)
        small = name == "min-dalle"
        config = json.loads(json.dumps({**MINI} if small else FLAT))
        guidance = 3.0 if small else 1.0
        tokens = harness.build_case("benchmarks.decode.peers:peer_case", {
            "peer": name, "pictures": 2, "tokens": 256 if small else 5, "guidance": guidance, "config": config, "device": "cpu",
            "dtype": "float32"})()
        assert tokens.shape == (2, 256 if small else 5)


def test_a_peer_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    for module in ("transformers", "min_dalle"):
        monkeypatch.setitem(sys.modules, module, None)
    assert decode_peers.missing("x-transformers") is None
    for name in ("transformers", "transformers, static cache", "min-dalle"):
        reason = decode_peers.missing(name)
        assert reason.startswith("pip install tokenloom[bench] (")
        assert len(reason.splitlines()) == 1
    with pytest.raises(UserError, match="unknown peer 'x-transformer'"):
        decode_peers.missing("x-transformer")
    with pytest.raises(UserError, match="unknown peer"):
        decode_peers.make_peer("min-dall", None)
