"""tokenizer_image/vit_vqgan.py. What it shares with the other families is in test_tokenizer_contract.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer_image import (
    QuantizerConfig,
    TokenizerLossConfig,
    ViTVQGAN,
    ViTVQGANConfig,
    preset,
    tokenizer_loss,
)
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.vit_vqgan import TransformerBlock, sincos_positions
from tokenloom_common.errors import UserError

DEBUG = preset("vit-debug")


def make_vit(**changes) -> ViTVQGAN:
    torch.manual_seed(0)
    return ViTVQGAN(ViTVQGANConfig.parse({**DEBUG.plain(), **changes}, "test"))


def make_image(batch: int = 3, side: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trained(model: ViTVQGAN, steps: int) -> ViTVQGAN:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        tokenizer_loss(model(make_image()), make_image(), TokenizerLossConfig()).total.backward()
        optimizer.step()
    return model


def stack_parameters(width: int, layers: int, mlp: int, inputs: int, outputs: int) -> int:
    """Of one side: each linear layer's weights and biases, the norms; attention has 4 width^2 and one bias."""
    block = 4 * width**2 + width + (width * mlp + mlp) + (mlp * width + width) + 2 * 2 * width
    head = (width * mlp + mlp) + (mlp * outputs + outputs)
    return inputs * width + width + layers * block + 2 * width + head


@pytest.mark.parametrize(("name", "encoder", "decoder", "total"), [
    ("vit-vqgan-s", (512, 8, 2048), (512, 8, 2048), 53_353_696),
    ("vit-vqgan-b", (768, 12, 3072), (768, 12, 3072), 175_905_504),
    ("vit-vqgan-l", (512, 8, 2048), (1280, 32, 5120), 663_826_912)])
def test_presets_have_the_sizes_that_their_configs_say(name, encoder, decoder, total):
    with torch.device("meta"):
        model = ViTVQGAN(preset(name))
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    patch = 3 * 8 * 8
    assert counts["encoder"] == stack_parameters(*encoder, patch, 32)
    assert counts["decoder"] == stack_parameters(*decoder, 32, patch)
    assert counts["quantizer"] == 8192 * 32
    assert sum(counts.values()) == total
    assert model.grid == (32, 32)
    assert model.codebook_size == 8192
    heads = {512: 8, 768: 12, 1280: 16}
    assert (model.config.encoder_heads, model.config.decoder_heads) == (heads[encoder[0]], heads[decoder[0]])


def test_blocks_of_the_presets_are_near_the_published_sizes():
    # Parti reports about 30M for the small encoder with its codebook, and about 600M for the large decoder.
    with torch.device("meta"):
        model = ViTVQGAN(preset("vit-vqgan-l"))
    small = sum(p.numel() for p in model.encoder.parameters()) + 8192 * 32
    assert small == pytest.approx(30e6, rel=0.15)
    assert sum(p.numel() for p in model.decoder.parameters()) == pytest.approx(600e6, rel=0.1)


def test_debug_preset_is_small():
    assert sum(p.numel() for p in make_vit().parameters()) < 50_000
    assert DEBUG.grid == (4, 4)


def test_patches_keep_their_place_on_the_way_in_and_out():
    model = make_vit()
    image = make_image()
    model.encoder = model.decoder = nn.Identity()
    latents = model.latents(image)
    assert latents.shape == (3, 48, 4, 4)
    assert torch.equal(latents[1, :, 2, 3], image[1, :, 8:12, 12:16].flatten())
    assert torch.equal(model.decode_vectors(latents), image)


def test_positions_are_sines_of_row_and_column():
    positions = sincos_positions(3, 2, 8)
    assert positions.shape == (6, 8)
    for row in range(3):
        for column in range(2):
            expected = [f(index / 10000**(i / 2)) for index in (row, column) for f in (math.sin, math.cos) for i in range(2)]
            torch.testing.assert_close(positions[row * 2 + column], torch.tensor(expected))


def test_equal_patches_at_different_positions_differ_in_their_latents_and_pixels():
    model = make_vit()
    latents = model.latents(torch.zeros(1, 3, 16, 16)).flatten(2)[0].T  # [N, D]
    distances = torch.cdist(latents, latents) + torch.eye(16)
    assert distances.min() > 1e-4
    patches = F.unfold(model.decode_vectors(torch.zeros(1, 8, 4, 4)), 4, stride=4)[0].T  # [N, 3*4*4]
    assert (torch.cdist(patches, patches) + torch.eye(16)).min() > 1e-4


def test_block_equals_the_plain_formula():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 16)
    hidden = torch.randn(2, 5, 8)
    normed = F.layer_norm(hidden, (8,))
    query, key, value = (normed @ part.T for part in block.qkv.weight.chunk(3))
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        shares = (query[..., head] @ key[..., head].transpose(1, 2) / 4**0.5).softmax(dim=2)
        heads.append(shares @ value[..., head])
    after = hidden + block.proj_out(torch.cat(heads, dim=2))
    expected = after + block.mlp[2](F.gelu(block.mlp[0](F.layer_norm(after, (8,)))))
    torch.testing.assert_close(block(hidden), expected)


def test_output_projection_has_tanh_in_the_middle_and_none_at_the_end():
    stack = make_vit(decoder_layers=1).decoder
    stack.blocks[0] = nn.Identity()
    tokens = torch.randn(1, 16, 8)
    normed = stack.norm_out(stack.proj_in(tokens) + stack.positions)
    expected = F.linear(F.linear(normed, stack.head.weight, stack.head.bias).tanh(), stack.proj_out.weight, stack.proj_out.bias)
    torch.testing.assert_close(stack(tokens), expected)
    assert expected.abs().max() > 1  # or the test would not see an activation


def test_positions_are_not_saved_and_follow_the_module_to_bfloat16():
    model = make_vit()
    assert not [name for name in model.state_dict() if "positions" in name]
    assert model.bfloat16().encoder.positions.dtype == torch.bfloat16


@pytest.mark.long
def test_training_lowers_the_loss_and_uses_codes():
    model = make_vit()
    image = make_image()
    before = F.l1_loss(model.eval()(image).reconstruction, image)
    trained(model, 60).eval()
    assert F.l1_loss(model.decode(model.encode(image)), image) < 0.8 * before
    assert model.encode(image).unique().numel() > 12  # of 48 positions: no collapse


def test_a_larger_decoder_speaks_the_same_codes():
    small = trained(make_vit(), 2).eval()
    large = make_vit(decoder_width=64, decoder_layers=3, decoder_heads=4, decoder_mlp=32).eval()
    assert code_fingerprint(large) != code_fingerprint(small)
    large.encoder.load_state_dict(small.encoder.state_dict())
    large.quantizer.load_state_dict(small.quantizer.state_dict())
    assert code_fingerprint(large) == code_fingerprint(small)
    assert torch.equal(large.encode(make_image()), small.encode(make_image()))


def test_heads_of_the_encoder_change_codes_and_so_the_fingerprint():
    one, other = make_vit(), make_vit(encoder_heads=4)
    assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
    assert code_fingerprint(one) != code_fingerprint(other)
    assert code_fingerprint(one) == code_fingerprint(make_vit(decoder_heads=4))


@pytest.mark.parametrize(("change", "message"), [
    ({"resolution": 18}, "resolution 18 is not divisible by patch_size 4; use 16"),
    ({"patch_size": 32}, "resolution 16 is not divisible by patch_size 32; use 32"),
    ({"encoder_heads": 3}, "encoder_width 32 is not divisible by encoder_heads 3; use a width of 33, or other encoder_heads"),
    ({"decoder_heads": 5}, "decoder_width 32 is not divisible by decoder_heads 5; use a width of 30, or other decoder_heads"),
    ({"decoder_width": 30}, "decoder_width 30 is not divisible by 4 .*; use 32"),
    ({"encoder_layers": 0}, "encoder_layers: .*got 0"),
    ({"embed_dim": 1}, "embed_dim 1 leaves two directions"),
    ({"encoder_with": 32}, "unknown key 'encoder_with'; did you mean 'encoder_width'")])
def test_impossible_configs_are_refused_with_value_and_remedy(change, message):
    with pytest.raises(UserError, match=message):
        ViTVQGANConfig.parse({**DEBUG.plain(), **change}, "config.json")


@pytest.mark.parametrize("change", [
    {"embed_dim": 4}, {"codebook_size": 32}, {"patch_size": 8}, {"quantizer": QuantizerConfig(l2_normalize=False)},
    *({f"{side}_{name}": value} for side in ("encoder", "decoder")
      for name, value in (("width", 64), ("layers", 1), ("heads", 4), ("mlp", 32)))], ids=str)
def test_each_config_field_changes_training(change):
    def outcome(model: ViTVQGAN) -> float:
        return float(sum(p.detach().double().abs().sum() for p in trained(model, 2).parameters()))

    assert outcome(make_vit(**change)) != outcome(make_vit())
