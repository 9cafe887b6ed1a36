"""tokenizer_image: config.py, layers.py and vqgan.py; its folder is in test_vqgan_folder.py."""

import copy

import pytest
import torch

from tests.small_vqgan import ATTENTIVE, DEBUG, loss_of, make_image, make_vqgan, trained_vqgan
from tokenizer_image import VQGANConfig, preset
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.layers import group_norm
from tokenizer_image.vqgan import VQGAN
from tokenloom_common.errors import UserError


@pytest.mark.parametrize(("name", "total", "tensors"), [
    ("vqgan-f16-1024", 72_141_699, 343), ("vqgan-f16-16384", 76_073_859, 343),
    ("vq-16", 71_883_403, 343), ("vq-8", 70_109_835, 299), ("vqgan-f8-gumbel", 66_890_627, 299)])
def test_presets_have_the_published_sizes(name, total, tensors):
    """The codebook counts as one tensor: it is learned by gradient. taming's Gumbel VQGAN is counted without its scores."""
    with torch.device("meta"):
        model = VQGAN(preset(name))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    scores = [sizes.pop(name) for name in ("quantizer.proj.weight", "quantizer.proj.bias") if name in sizes]
    assert scores == ([256 * 8192, 8192] if name == "vqgan-f8-gumbel" else [])
    assert sum(sizes.values()) == total
    assert len(sizes) == tensors
    assert len([name for name in model.state_dict() if not name.startswith("quantizer.")]) == tensors - 1
    assert model.config.grid == {5: (16, 16), 4: (32, 32)}[len(model.config.channel_multipliers)]


def test_debug_preset_is_small_and_complete():
    assert sum(p.numel() for p in make_vqgan().parameters()) < 200_000
    assert DEBUG.grid == (8, 8)
    assert DEBUG.num_tokens == 64
    assert DEBUG.downsampling == 2
    with pytest.raises(UserError, match="did you mean 'vq-16'"):
        preset("vq16")


def test_state_dict_has_the_published_names():
    with torch.device("meta"):
        names = set(VQGAN(preset("vq-16")).state_dict())
    for name in ("encoder.conv_in.weight", "encoder.down.2.block.0.nin_shortcut.weight",
                 "encoder.down.4.attn.1.q.weight", "encoder.down.0.downsample.conv.weight",
                 "encoder.mid.attn_1.proj_out.bias", "encoder.norm_out.weight",
                 "quant_conv.weight", "post_quant_conv.bias", "decoder.up.4.attn.2.norm.weight",
                 "decoder.up.1.upsample.conv.weight", "decoder.up.0.block.2.conv2.bias", "decoder.conv_out.weight"):
        assert name in names
    assert not {"encoder.down.4.downsample.conv.weight", "decoder.up.0.upsample.conv.weight",
                "encoder.down.3.attn.0.q.weight"} & names


BY_GRADIENT = VQGANConfig.parse({**DEBUG.plain(), "quantizer": {"learn_codebook_by_gradient": True}}, "test")


@pytest.mark.parametrize("config", [DEBUG, ATTENTIVE, BY_GRADIENT], ids=["debug", "attention", "gradient"])
def test_every_parameter_gets_a_gradient(config):
    model = make_vqgan(config).train()
    image = make_image()
    loss_of(model(image), image).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to every score of a query, which softmax removes.
    assert [name for name in without if not name.endswith(".k.bias")] == []


def test_codebook_moves_in_training_and_stays_in_use():
    model = trained_vqgan()
    before = {name: tensor.clone() for name, tensor in model.quantizer.state_dict().items()}
    image = make_image()
    model.encode(image)  # in training mode
    model.eval()
    model(image)
    codes = model.encode(image)
    assert torch.equal(codes, model.encode(image))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.quantizer.state_dict().items())
    model.train()(image)
    assert not torch.equal(model.quantizer.codebook, before["vq._codebook.embed"][0])


def test_encode_before_training_does_not_start_kmeans():
    model = make_vqgan().eval()
    model.encode(make_image())
    model(make_image())
    assert not model.quantizer.vq._codebook.initted


def test_encode_of_a_batch_equals_singles():
    model = trained_vqgan(ATTENTIVE).eval()
    image = make_image()
    codes = model.encode(image)
    assert codes.shape == (4, 8, 8)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, torch.cat([model.encode(one[None]) for one in image]))
    assert codes.unique().numel() > 4
    torch.testing.assert_close(model.decode(codes), torch.cat([model.decode(one[None]) for one in codes]))


def test_decode_of_encode_equals_the_clamped_forward():
    model = trained_vqgan().eval()
    image = make_image()
    result = model(image)
    assert torch.equal(result.codes, model.encode(image))
    torch.testing.assert_close(model.decode(result.codes), result.reconstruction.clamp(-1, 1))
    with torch.no_grad():
        model.last_layer.mul_(100)
    decoded = model.decode(result.codes)
    assert decoded.min() == -1
    assert decoded.max() == 1


@pytest.mark.parametrize(("codes", "message"), [
    (torch.full((1, 8, 8), 64), "code 64 is outside the codebook: valid codes are 0 to 63"),
    (torch.full((1, 8, 8), -1), "code -1 is outside"),
    (torch.zeros(1, 8, 8), "expected integer codes, got torch.float32"),
    (torch.zeros(1, 8, 8, dtype=torch.bool), "expected integer codes"),
    (torch.zeros(1, 8, 7, dtype=torch.int64), r"expected codes \[B, 8, 8\], got \[1, 8, 7\]"),
    (torch.zeros(1, 64, dtype=torch.int64), "tokens_to_codes")])
def test_decode_refuses_bad_codes(codes, message):
    with pytest.raises(UserError, match=message):
        make_vqgan().decode(codes)


def test_decode_takes_any_integer_dtype_and_an_empty_batch():
    model = make_vqgan().eval()
    codes = torch.arange(64).view(1, 8, 8)
    assert torch.equal(model.decode(codes.to(torch.int16)), model.decode(codes))
    assert model.decode(codes[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("image", "message"), [
    (torch.zeros(1, 3, 32, 32), r"expected an image \[B, 3, 16, 16\], got \[1, 3, 32, 32\]"),
    (torch.zeros(3, 16, 16), "expected an image"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "pixels_to_float")])
def test_encode_refuses_bad_images(image, message):
    with pytest.raises(UserError, match=message):
        make_vqgan().encode(image)


def test_downsampling_pads_right_and_below_only():
    model = make_vqgan()
    sample = torch.zeros(1, 16, 4, 4)
    sample[..., 0, 0] = 1
    layer = model.encoder.down[0].downsample
    with torch.no_grad():
        expected = layer.conv.weight[..., 0, 0].sum(dim=1) + layer.conv.bias
        torch.testing.assert_close(layer(sample)[0, :, 0, 0], expected)


def test_attention_equals_the_plain_formula():
    model = make_vqgan(ATTENTIVE)
    block = model.encoder.mid.attn_1
    hidden = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(3))
    query, key, value = (conv(block.norm(hidden)).flatten(2) for conv in (block.q, block.k, block.v))
    shares = (torch.einsum("bci,bcj->bij", query, key) * 32**-0.5).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", shares, value).view_as(hidden)
    torch.testing.assert_close(block(hidden), hidden + block.proj_out(mixed))


def test_quantizer_stays_float32_in_bfloat16_and_under_autocast():
    model = trained_vqgan()
    book = model.quantizer.codebook.clone()
    latents = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = model.quantizer.nearest(latents)
        assert model(make_image()).losses["commit"].value.dtype == torch.float32
    assert torch.equal(codes, trained_vqgan().quantizer.nearest(latents))
    model = trained_vqgan().bfloat16()
    assert torch.equal(model.quantizer.codebook, book)
    result = model(make_image().bfloat16())
    assert result.reconstruction.dtype == torch.bfloat16
    assert result.losses["commit"].value.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in model.quantizer.buffers() if t.is_floating_point())
    assert model.eval().decode(result.codes).dtype == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("change", [
    {"mid_attention": False}, {"dropout": 0.5}, {"attention_resolutions": [8]}, {"num_res_blocks": 2},
    {"norm_groups": 4}, {"channels": 32}, {"z_channels": 8}, {"embed_dim": 4}, {"codebook_size": 32},
    {"channel_multipliers": [1, 1]}, {"decoder_channels": 24}, {"decoder_res_blocks": 2},
    {"norm_eps": 1e-3}, {"input_range": "unit"}, {"output_range": "unit"},
    {"quantizer": {"l2_normalize": False}}], ids=str)  # the other options of quantizers: test_quantizers.py
def test_each_config_field_changes_training(change):
    def outcome(config: VQGANConfig) -> list[float]:
        model = trained_vqgan(config, steps=2)
        total = sum(p.detach().double().sum() for p in model.parameters())
        return [float(total), float(model.quantizer.codebook.sum())]

    assert outcome(VQGANConfig.parse({**DEBUG.plain(), **change}, "test")) != outcome(DEBUG)


@pytest.mark.parametrize("change", [{"decoder_channels": 24}, {"decoder_res_blocks": 2}], ids=str)
def test_a_larger_decoder_leaves_the_codes_as_they_are(change):
    base, larger = make_vqgan(), make_vqgan(VQGANConfig.parse({**DEBUG.plain(), **change}, "test"))
    before, after = base.state_dict(), larger.state_dict()
    decides = [name for name in before if name.startswith(("encoder.", "quant_conv.", "quantizer."))]
    assert decides == [name for name in after if name.startswith(("encoder.", "quant_conv.", "quantizer."))]
    assert all(torch.equal(before[name], after[name]) for name in decides)
    assert code_fingerprint(base) == code_fingerprint(larger)
    assert sum(p.numel() for p in larger.decoder.parameters()) > 1.1 * sum(p.numel() for p in base.decoder.parameters())
    assert larger.eval()(make_image()).reconstruction.shape == (4, 3, 16, 16)


# ---- what published checkpoints differ in


def variant(model: VQGAN, **changes) -> VQGAN:
    """The same weights under another config."""
    other = make_vqgan(VQGANConfig.parse({**model.config.plain(), **changes}, "test"))
    other.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()})
    return other.eval()


def test_norm_eps_is_that_of_every_norm_and_changes_codes_and_pictures():
    def epsilons(model: VQGAN) -> set[float]:
        return {module.eps for module in model.modules() if isinstance(module, torch.nn.GroupNorm)}

    model = trained_vqgan(ATTENTIVE).eval()
    other = variant(model, norm_eps=0.1)
    assert (epsilons(model), epsilons(other)) == ({1e-6}, {0.1})
    image = make_image()
    codes = model.encode(image)
    assert not torch.equal(codes, other.encode(image))
    assert not torch.equal(model.decode(codes), other.decode(codes))
    assert code_fingerprint(model) != code_fingerprint(other)
    assert code_fingerprint(model) == code_fingerprint(variant(model, norm_eps=1e-6))


def test_a_decoder_of_the_unit_range_gives_signed_pictures():
    model = trained_vqgan().eval()
    unit = variant(model, output_range="unit")
    image = make_image()
    codes = model.encode(image)
    with torch.no_grad():
        for each in (model, unit):
            each.last_layer.mul_(5)
        raw = model.decode_vectors(model.lookup(codes))
        assert raw.min() < 0 and raw.max() > 1
        # encode, decode and forward lay memory out differently, and convolutions round differently then; pixels are up to 10
        torch.testing.assert_close(unit.decode(codes), raw.clamp(0, 1) * 2 - 1, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(unit(image).reconstruction, raw * 2 - 1, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(unit.freeze_codes()(image).reconstruction, raw * 2 - 1, atol=1e-4, rtol=1e-5)
    assert code_fingerprint(unit) == code_fingerprint(model)


def test_an_encoder_of_the_unit_range_is_given_signed_pictures():
    model = trained_vqgan().eval()
    unit = variant(model, input_range="unit")
    image = make_image()
    assert torch.equal(unit.encode(image), model.encode((image + 1) / 2))
    assert torch.equal(unit(image).codes, unit.encode(image))
    assert not torch.equal(unit.encode(image), model.encode(image))
    assert code_fingerprint(unit) != code_fingerprint(model)


def test_a_detokenizer_holds_and_does_the_decoders_half_only(tmp_path):
    model = trained_vqgan().eval()
    half = variant(model, has_encoder=False)
    assert {name.split(".")[0] for name in half.state_dict()} == {"quantizer", "post_quant_conv", "decoder"}
    loaded = VQGAN.from_pretrained(half.save_pretrained(tmp_path / "m"))
    codes = model.encode(make_image())
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert code_fingerprint(loaded) == code_fingerprint(half) != code_fingerprint(model)
    with torch.no_grad():
        half.quantizer.vq._codebook.embed.mul_(-1)
    assert code_fingerprint(loaded) != code_fingerprint(half)
    for call in (loaded.encode, loaded, loaded.freeze_codes()):
        with pytest.raises(UserError, match=r"has no encoder .*convert the whole VQGAN") as refused:
            call(make_image())
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("norm", [group_norm(16, 4), torch.nn.LayerNorm(16)], ids=["group", "layer"])
def test_norms_keep_their_statistics_in_float32_in_bfloat16(norm):
    """PyTorch's kernels do; statistics in bfloat16 would lose a deviation of 1 beside a mean of 60."""
    torch.manual_seed(0)
    hidden = (torch.randn(2, 16, 16, 16) + 60).bfloat16()
    exact = norm(hidden.float())
    rounded = copy.deepcopy(norm).bfloat16()(hidden).float()
    torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=2**-8)
