"""tokenizer_image/discriminators.py: sizes, norms, blur, minibatch statistics, refusals."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.small_discriminators import each_small, make, pictures
from tokenizer_image.adversarial import (
    r1_penalty,
)
from tokenizer_image.discriminators import (
    DiscriminatorConfig,
    EqualConv,
    append_deviation,
    build_discriminator,
    statistics_group,
)
from tokenloom_common.errors import UserError

# the networks

def test_patchgan_has_the_published_size():
    """pix2pix: 4x4 convolutions 3-64-128-256-512-1; biases where no norm follows; a batch norm has two numbers a channel."""
    weights = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512 * 1)
    with_batch_norm = weights + (64 + 1) + 2 * (128 + 256 + 512)
    with_biases = weights + (64 + 1) + (128 + 256 + 512)  # CycleGAN's: instance norm, which learns nothing
    assert (with_batch_norm, with_biases) == (2_765_633, 2_764_737)
    for norm, size in (("batch", with_batch_norm), ("group", with_batch_norm), ("none", with_biases)):
        with torch.device("meta"):
            model = build_discriminator(DiscriminatorConfig(norm=norm), 256)
        assert sum(p.numel() for p in model.parameters()) == size


def test_stylegan_has_the_size_of_its_structure():
    widths = [64, 128, 256, 512, 512, 512, 512]  # 256, 128, ... 4 pixels
    size = (3 + 1) * 64
    for before, after in pairwise(widths):
        size += (9 * before + 1) * before + (9 * before + 1) * after + before * after
    size += (9 * 513 + 1) * 512 + (512 * 16 + 1) * 512 + 512 + 1
    with torch.device("meta"):
        model = build_discriminator(DiscriminatorConfig(kind="stylegan"), 256)
    assert sum(p.numel() for p in model.parameters()) == size == 24_001_089


@pytest.mark.parametrize(("options", "resolution", "shape"), [
    ({"channels": 4}, 64, (2, 1, 6, 6)), ({"channels": 4, "layers": 2}, 16, (2, 1, 2, 2)), ({"channels": 4}, 24, (2, 1, 1, 1)),
    ({"channels": 4, "layers": 1}, 9, (2, 1, 2, 2)), ({"channels": 4, "kind": "stylegan"}, 32, (2, 1)),
    ({"channels": 4, "kind": "stylegan"}, 8, (2, 1))])
def test_shapes_of_the_logits(options, resolution, shape):
    assert make(resolution, **options)(pictures(2, resolution)).shape == shape
    one_channel = make(resolution, in_channels=1, **options)(pictures(2, resolution)[:, :1])
    assert one_channel.shape == shape


def test_a_patch_is_70_pixels():
    image = pictures(1, 128).requires_grad_()
    make(128, channels=2, norm="none")(image)[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(dim=0).values - seen.min(dim=0).values + 1).tolist() == [70, 70]


def test_patchgan_begins_as_published():
    model = make(64, channels=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
    slopes = {module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_group_norm_judges_each_picture_by_itself_and_batch_norm_does_not():
    image = pictures(3)
    for norm, alone in (("group", True), ("none", True), ("batch", False)):
        model = make(channels=8, layers=2, norm=norm).train()
        assert torch.allclose(model(image)[:1], model(image[:1]), atol=1e-5) is alone


def test_group_norm_has_four_channels_a_group_or_more():
    groups = [[m.num_groups for m in make(64, channels=width, norm="group").modules() if isinstance(m, nn.GroupNorm)]
              for width in (1, 6, 64)]
    assert groups == [[1, 1, 2], [2, 4, 8], [32, 32, 32]]


def test_convolutions_learn_at_one_speed():
    """Weights N(0, 1), divided by the root of the inputs when used: outputs have the variance of the inputs."""
    torch.manual_seed(0)
    conv = EqualConv(64, 64, 3)
    assert conv.weight.std().item() == pytest.approx(1.0, rel=0.05)
    hidden = torch.randn(2, 64, 12, 12)
    torch.testing.assert_close(conv(hidden), F.conv2d(hidden, conv.weight / math.sqrt(64 * 9), padding=1))
    assert conv(hidden)[..., 1:-1, 1:-1].std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("kernel", [1, 3])
def test_halving_blurs_first(kernel):
    """A constant stays, and a chessboard, which every second pixel would turn into a constant, vanishes."""
    conv = EqualConv(1, 1, kernel, halve=True)
    with torch.no_grad():
        conv.weight.zero_()[..., kernel // 2, kernel // 2] = kernel  # times the scale: 1
    chessboard = (torch.arange(16)[:, None] + torch.arange(16)[None]) % 2 * 2.0 - 1
    flat, board = conv(torch.ones(1, 1, 16, 16)), conv(chessboard.view(1, 1, 16, 16))
    assert flat.shape == (1, 1, 8, 8)
    torch.testing.assert_close(flat[..., 1:-1, 1:-1], torch.ones(1, 1, 6, 6))
    torch.testing.assert_close(board[..., 1:-1, 1:-1], torch.zeros(1, 1, 6, 6))
    middle = torch.zeros(1, 1, 16, 16)
    middle[..., 6:8, 6:8] = 1.0  # the cell of output 3 and what is around it are seen the same from both sides
    torch.testing.assert_close(conv(middle)[0, 0, 2:5, 2:5], conv(middle)[0, 0, 2:5, 2:5].flip(0, 1))
    assert conv(middle)[0, 0].argmax().item() == 3 * 8 + 3


def test_the_group_of_the_statistics_divides_the_batch():
    assert [statistics_group(batch) for batch in range(1, 13)] == [1, 2, 3, 4, 5, 3, 7, 4, 3, 5, 11, 4]


def test_minibatch_deviation_by_hand():
    hidden = torch.arange(8.0).view(8, 1, 1, 1) * torch.ones(1, 2, 2, 2)
    out = append_deviation(hidden)
    assert out.shape == (8, 3, 2, 2)
    assert torch.equal(out[:, :2], hidden)
    assert out[:, 2].flatten().tolist() == pytest.approx([math.sqrt(5)] * 32)  # 0 2 4 6 and 1 3 5 7
    hidden[1::2] = 1.0
    assert append_deviation(hidden)[:, 2, 0, 0].tolist() == pytest.approx([math.sqrt(5), 1e-4] * 4)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_minibatch_deviation_with_an_odd_batch(batch):
    model = make(kind="stylegan", channels=4)
    image = pictures(batch)
    assert model(image).shape == (batch, 1)
    assert torch.isfinite(model(image)).all()
    expected = (image.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
    torch.testing.assert_close(append_deviation(image)[:, 3], expected.expand(batch, 16, 16))


def test_equal_pictures_are_noticed():
    """The logit of a picture depends on whether the others of its batch are the same one."""
    model = make(kind="stylegan", channels=4)
    image = pictures(4)
    assert not torch.allclose(model(image)[:1], model(image[:1].repeat(4, 1, 1, 1))[:1], atol=1e-4)


@each_small
def test_logits_are_float32_under_autocast(options):
    model, image = make(**options), pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image)
        penalty = r1_penalty(model, image)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(image))
    assert penalty.dtype == torch.float32
    assert model(image.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("field", DiscriminatorConfig.model_fields)
def test_every_option_changes_the_discriminator(field):
    change = {"kind": "stylegan", "channels": 4, "layers": 2, "norm": "group", "max_channels": 16}[field]
    models = [make(32, **{"channels": 8, **options}) for options in ({}, {field: change})]
    assert repr(models[0]) != repr(models[1])
    if field == "max_channels":  # the one that both kinds cut their widths with
        stylegans = [make(32, kind="stylegan", channels=8, **options) for options in ({}, {field: change})]
        assert stylegans[1].conv.weight.shape[0] == 16 < stylegans[0].conv.weight.shape[0] == 64


@pytest.mark.parametrize(("values", "words"), [
    ({"channels": 600}, "channels 600 is above max_channels 512; use at most 512, or raise max_channels"),
    ({"kind": "stylegan", "norm": "group"}, "norm group has no effect on kind stylegan.*leave norm at batch"),
    ({"kind": "stylegan", "layers": 4}, "layers 4 has no effect on kind stylegan.*leave layers at 3"),
    ({"layers": 10**9}, "layers 1000000000 is above 16"), ({"layers": 0}, "layers"), ({"channels": 0}, "channels"),
    ({"max_channels": 0}, "max_channels"), ({"norm": "layer"}, "norm"), ({"kind": "pixelgan"}, "kind"),
    ({"chanels": 3}, "did you mean 'channels'")])
def test_impossible_discriminators_are_refused(values, words):
    with pytest.raises(UserError, match=words) as caught:
        DiscriminatorConfig.parse(values, "discriminator")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "resolution", "words"), [
    ({}, 16, r"discriminator\.layers 3 needs pictures of 24 pixels or more, got 16; use at most 2 layers"),
    ({"layers": 5}, 95, "96 pixels or more, got 95; use at most 4 layers"), ({}, 4, "got 4; use a larger picture"),
    ({"kind": "stylegan"}, 48, r"power of two from 8 on, got 48; use a resolution of 32, or kind patchgan"),
    ({"kind": "stylegan"}, 4, "got 4; use a resolution of 8, or kind patchgan")])
def test_pictures_that_are_too_small_are_refused(options, resolution, words):
    with pytest.raises(UserError, match=words) as caught:
        make(resolution, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("resolution", "layers"), [(6, 1), (7, 1), (23, 2), (24, 3), (95, 4), (96, 5)])
def test_the_depth_that_a_refusal_names_fits(resolution, layers):
    with pytest.raises(UserError, match=f"use at most {layers} layers"):
        make(resolution, channels=2, layers=layers + 1)
    make(resolution, channels=2, layers=layers)(pictures(1, resolution))


def test_another_size_than_the_stylegans_is_refused():
    with pytest.raises(UserError, match=r"expected an image \[B, 3, 16, 16\], got \[1, 3, 32, 32\]"):
        make(16, kind="stylegan", channels=4)(pictures(1, 32))
