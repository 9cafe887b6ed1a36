"""The training graph: parity with x-transformers, gradients, positions, text tokenizer."""

from __future__ import annotations

import pytest
import torch
from x_transformers import XTransformer
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

from seq2seq import EncoderDecoder, Seq2SeqConfig, TextTokenizer
from seq2seq.layers import recompute_activations
from seq2seq.losses import image_token_loss
from seq2seq.positions import flat_positions, grid_positions, rotary_angles
from seq2seq.text_tokenizer import END, NULL, PAD
from tests import tiny
from tokenloom_common.errors import MissingFileError, UserError


def test_our_model_equals_a_plain_xtransformer_with_the_same_weights():
    ours = tiny.seq2seq(rotary="1d", learned_positions=False)
    config = ours.config
    shared = {"heads": 2, "attn_dim_head": 16, "use_rmsnorm": True, "attn_qk_rmsnorm": True, "ff_glu": True,
              "ff_swish": True, "ff_mult": config.feedforward_multiplier, "rotary_pos_emb": True, "rotary_emb_dim": 16,
              "use_abs_pos_emb": False, "verbose": False}
    size = config.codebook_size
    theirs = XTransformer(
        dim=32, enc_num_tokens=320, enc_max_seq_len=config.text_length, enc_depth=2, dec_num_tokens=size + 1,
        dec_max_seq_len=config.num_tokens + 1, dec_depth=2,
        **{f"enc_{k}": v for k, v in shared.items()}, **{f"dec_{k}": v for k, v in shared.items()}).eval()
    decoder = theirs.decoder.net
    theirs.encoder.attn_layers.load_state_dict(ours.text_encoder.layers.state_dict(), strict=False)
    decoder.attn_layers.load_state_dict(ours.decoder.state_dict(), strict=False)
    with torch.no_grad():
        theirs.encoder.token_emb.emb.weight.copy_(ours.text_encoder.text_input.embedding.weight)
        decoder.token_emb.emb.weight.copy_(torch.cat([ours.image_embedding.weight, ours.begin_of_image[None]]))
        decoder.to_logits.weight.copy_(torch.cat([ours.to_logits.weight, torch.zeros(1, 32)]))
    text = tiny.text_tokenizer().encode(["a red heart", "octopus"])
    image_tokens = torch.randint(0, size, (2, config.num_tokens))
    begin = torch.full((2, 1), size)
    with torch.no_grad():
        memory = theirs.encoder(text.text_input, mask=text.text_mask, return_embeddings=True)
        expected = decoder(torch.cat([begin, image_tokens[:, :-1]], dim=1), context=memory, context_mask=text.text_mask)
        assert (ours(*text, image_tokens).image - expected[..., :size]).abs().max() < 1e-5


@pytest.mark.parametrize(("changes", "formula"), [
    ({"norm_eps": 1e-3}, lambda x, norm: x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight),
    ({"norm": "layernorm", "norm_bias": True}, lambda x, norm: (x - x.mean(-1, keepdim=True)) * (
        x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt() * norm.weight + norm.bias),
    ({"norm": "layernorm", "norm_eps": 1e-3}, lambda x, norm: (x - x.mean(-1, keepdim=True)) * (
        x.var(-1, keepdim=True, unbiased=False) + 1e-3).rsqrt() * norm.weight)])
def test_norms_with_an_epsilon_or_a_bias_are_everywhere(changes, formula):
    model = tiny.seq2seq(norm_placement="sandwich", **changes)
    x = torch.randn(5, 32) * 0.02  # as embeddings are at first: the epsilon is percents of their mean square
    norms = [norm for norm in model.modules() if type(norm) in (torch.nn.LayerNorm, torch.nn.RMSNorm)]
    assert len(norms) == 2 * 2 * 2 + 1 + 2 * 3 * 2 + 1  # before and after each block, and at the end, of both stacks
    for norm in norms:
        torch.testing.assert_close(norm(x), formula(x, norm))
    fresh = EncoderDecoder(model.config).decoder.final_norm
    assert all(torch.equal(new, torch.full_like(new, float(name == "weight"))) for name, new in fresh.named_parameters())


def test_a_norms_bias_is_refused_where_it_has_none():
    with pytest.raises(ValueError, match="norm_bias: true needs norm: layernorm"):
        tiny.seq2seq(norm_bias=True)


def test_every_parameter_gets_a_gradient():
    model = tiny.seq2seq().train()
    text = tiny.text_tokenizer().encode(["a red heart", ""])
    image_tokens = torch.randint(0, 32, (2, 16))
    image_token_loss(model(*text, image_tokens).image, image_tokens).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_a_token_depends_only_on_the_tokens_before_it():
    model = tiny.seq2seq()
    text = tiny.text_tokenizer().encode(["a red heart"])
    image_tokens = torch.randint(0, 32, (1, 16))
    changed = image_tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 32
    with torch.no_grad():
        difference = (model(*text, image_tokens).image - model(*text, changed).image).abs().amax(dim=-1)[0]
    assert difference[:7].max() < 1e-6
    assert difference[7] > 1e-4


def apply_rotary(heads, angles):
    """Rotate pairs (0,1), (2,3), ... of heads [B, heads, n, d] by angles [1, n, d]."""
    first, second = heads[..., 0::2], heads[..., 1::2]
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return (heads * angles.cos() + quarter_turn * angles.sin()).type(heads.dtype)


def test_one_dimensional_rotary_equals_x_transformers():
    heads = torch.randn(2, 3, 7, 16)
    theirs = apply_rotary_pos_emb(heads, RotaryEmbedding(16)(torch.arange(7))[0])
    assert torch.allclose(apply_rotary(heads, rotary_angles(flat_positions(7), 16)), theirs, atol=1e-6)


def test_two_dimensional_rotary_depends_on_row_and_column_distance_only():
    angles = rotary_angles(grid_positions((4, 5)), 16)
    query, key = torch.randn(16), torch.randn(16)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        at = [apply_rotary(v[None, None, None], angles[:, r * 5 + c: r * 5 + c + 1]) for v, (r, c) in ((query, a), (key, b))]
        return float((at[0] * at[1]).sum())

    assert score((0, 0), (1, 2)) == pytest.approx(score((2, 2), (3, 4)), abs=1e-4)
    assert score((0, 0), (1, 2)) != pytest.approx(score((0, 0), (2, 2)), abs=1e-3)  # another row
    assert score((0, 0), (1, 2)) != pytest.approx(score((0, 0), (1, 3)), abs=1e-3)  # another column


def test_a_bfloat16_model_keeps_exact_angles():
    exact, rounded = tiny.seq2seq(), tiny.seq2seq().bfloat16()
    assert torch.equal(exact.rotary_angles(), rounded.rotary_angles())
    assert "angles" not in " ".join(exact.state_dict())


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "norm": "layernorm", "feedforward": "gelu"}, {"rotary": "none"}])
def test_a_bfloat16_model_runs_and_stays_near_the_float32_one(changes):
    model = tiny.seq2seq(**changes)
    text = tiny.text_tokenizer().encode(["a red heart", ""])
    image_tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(*text, image_tokens).image
        rounded = model.bfloat16()(*text, image_tokens).image
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_loss_by_hand_on_two_tokens():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    expected = (torch.log(torch.tensor(2.0)) + torch.log(1 + torch.exp(torch.tensor(2.0)))) / 2
    assert image_token_loss(logits, torch.tensor([[0, 1]])) == pytest.approx(float(expected), abs=1e-6)


def test_saving_and_loading_gives_equal_logits(tmp_path):
    model = tiny.seq2seq()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    loaded = EncoderDecoder.from_pretrained(tmp_path / "m")
    text = tiny.text_tokenizer().encode(["a red heart"])
    image_tokens = torch.randint(0, 32, (1, 16))
    with torch.no_grad():
        assert torch.equal(model(*text, image_tokens).image, loaded(*text, image_tokens).image)


@pytest.mark.parametrize(("changes", "words"), [
    ({"kv_heads": 3}, "kv_heads 3 must divide heads 2"), ({"head_dim": 6}, "multiple of 4"),
    ({"rotary": "none", "learned_positions": False}, "cannot tell positions apart"),
    ({"rotary": "3d"}, "rotary"), ({"widht": 8}, "did you mean 'width'")])
def test_impossible_configs_are_refused(changes, words):
    values = {**tiny.seq2seq().config.plain(), **changes}
    with pytest.raises(UserError, match=words):
        Seq2SeqConfig.parse(values, "model")


def test_wrong_lengths_are_refused():
    model = tiny.seq2seq()
    text = tiny.text_tokenizer().encode(["a"])
    with pytest.raises(ValueError, match="columns"):
        model.encode_text(text.text_input[:, :3], text.text_mask[:, :3])
    with pytest.raises(ValueError, match="no slot"):
        model.decode(model.encode_text(*text), text.text_mask, torch.zeros(1, 16, dtype=torch.int64))


def test_text_tokenizer_round_trip_and_null_caption(tmp_path):
    tokenizer = tiny.text_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    loaded = TextTokenizer.from_pretrained(tmp_path / "t")
    batch = loaded.encode(["A RED heart", "a red heart", "", "🐙 ünïcode 漢字"])
    assert torch.equal(batch.text_input[0], batch.text_input[1])  # case is folded
    assert batch.text_input[2, :3].tolist() == [NULL, END, PAD]
    assert torch.equal(loaded.null_caption().text_input[0], batch.text_input[2])
    assert torch.equal(batch.text_mask, batch.text_input != PAD)
    assert not (batch.text_input[3] == 1).any()  # byte fallback: nothing is unknown
    assert torch.equal(tokenizer.encode(["a red heart"]).text_input, loaded.encode(["a red heart"]).text_input)


def test_words_that_come_often_are_one_id_however_few_words_there_are():
    captions = [f"a {color} {shape} right of {color} squares" for color in ("purple", "orange", "green")
                for shape in ("triangle", "diamond", "star")]  # unigram pieces would never hold a word that no other contains
    words = TextTokenizer.train(captions, vocab_size=400, text_length=16).words("a purple triangle right of orange squares")
    assert words == ["▁a", "▁purple", "▁triangle", "▁right", "▁of", "▁orange", "▁squares", "</s>"]


def test_a_long_caption_is_cut_with_one_warning_and_keeps_its_end(caplog):
    tokenizer = tiny.text_tokenizer()
    with caplog.at_level("WARNING"):
        batch = tokenizer.encode(["heart " * 50, "circle " * 2000])
        tokenizer.encode(["square " * 50])
    assert (batch.text_input[:, -1] == END).all()
    assert len(caplog.records) == 1
    assert "text_length 12" in caplog.text


def test_the_null_symbol_cannot_be_typed():
    assert NULL not in tiny.text_tokenizer().encode(["<null> heart </s> <pad>"]).text_input


def test_damaged_text_tokenizers_are_named(tmp_path):
    folder = tiny.text_tokenizer().save_pretrained(tmp_path / "t")
    (folder / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"spiece\.model"):
        TextTokenizer.from_pretrained(folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(MissingFileError, match=r"spiece\.model"):
        TextTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match="no captions"):
        TextTokenizer.train([], 300, 8)


@pytest.mark.parametrize("family", [tiny.seq2seq, tiny.decoder_only])
def test_a_bfloat16_model_reads_float32_features(family):
    model = family(text_vocab_size=None, text_feature_width=6)
    features = torch.randn(2, tiny.TEXT_LENGTH, 6, generator=torch.Generator().manual_seed(0))
    mask, tokens = torch.ones(2, tiny.TEXT_LENGTH, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad():
        exact = model(features, mask, tokens).image
        rounded = model.bfloat16()(features, mask, tokens).image
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("family", ["seq2seq", "decoder_only"])
def test_recomputed_activations_give_the_same_gradients_with_dropout_and_keep_less(family):
    made = getattr(tiny, family)
    kept, gradients = {}, {}
    for on in (False, True):
        model = made(dropout=0.2).train()
        recompute_activations(model, on)
        config = model.config
        text = torch.randint(4, config.text_vocab_size, (2, config.text_length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(text, dtype=torch.bool)
        tokens = torch.randint(0, config.codebook_size, (2, config.num_tokens), generator=torch.Generator().manual_seed(1))
        held = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, held=held: held.append(tensor.numel()) or tensor,
                                                      lambda tensor: tensor):
            out = model(text, mask, tokens).image
        out.square().mean().backward()
        kept[on], gradients[on] = sum(held), {name: p.grad for name, p in model.named_parameters()}
    assert kept[True] < 0.5 * kept[False]
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name]), name
