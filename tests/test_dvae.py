"""tokenizer_image/dvae.py. What it shares with the other families is in test_tokenizer_contract.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenizer_image import DVAE, DVAEConfig, TokenizerLossConfig, preset, tokenizer_loss
from tokenizer_image.dvae import BottleneckBlock
from tokenizer_image.losses import logit_laplace_loss, logit_laplace_mean
from tokenizer_image.quantizers.gumbel import gumbel_softmax, half_cosine, kl_to_uniform
from tokenloom_common.errors import UserError

DEBUG = preset("dvae-debug")


def make_dvae(**changes) -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig.parse({**DEBUG.plain(), **changes}, "test"))


def make_image(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trained(model: DVAE, steps: int, image: torch.Tensor) -> DVAE:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        model.set_step(step, steps)
        optimizer.zero_grad()
        tokenizer_loss(model(image), image, TokenizerLossConfig()).total.backward()
        optimizer.step()
    return model


def conv_parameters(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side**2 + outputs


def block_parameters(inputs: int, outputs: int, sides: tuple[int, ...]) -> int:
    inner = outputs // 4
    widths = [inputs, inner, inner, inner, outputs]
    total = sum(conv_parameters(widths[i], widths[i + 1], sides[i]) for i in range(4))
    return total + (conv_parameters(inputs, outputs, 1) if inputs != outputs else 0)


def test_dalle_preset_has_the_published_sizes():
    with torch.device("meta"):
        model = DVAE(preset("dalle-dvae"))
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    down, up = (256, 512, 1024, 2048), (2048, 1024, 512, 256)
    expected = conv_parameters(3, 256, 7) + conv_parameters(2048, 8192, 1)
    expected += sum(block_parameters(before, after, (3, 3, 3, 1)) + block_parameters(after, after, (3, 3, 3, 1))
                    for before, after in zip((256, *down), down, strict=False))
    assert counts["encoder"] == expected == 53_786_240
    expected = conv_parameters(8192, 128, 1) + conv_parameters(256, 6, 1)
    expected += sum(block_parameters(before, after, (1, 3, 3, 3)) + block_parameters(after, after, (1, 3, 3, 3))
                    for before, after in zip((128, *up), up, strict=False))
    assert expected == 43_829_766
    # the 128 biases of the published first layer are part of every code vector here
    assert counts["embedding"] + counts["decoder"] == expected - 128
    assert model.config.grid == (32, 32)
    assert model.codebook.shape == (8192, 128)
    assert model.encoder.groups[0][0].gain == model.decoder.groups[0][0].gain == 1 / 64


def test_debug_preset_is_small():
    assert sum(p.numel() for p in make_dvae().parameters()) < 50_000
    assert DEBUG.grid == (4, 4)


def test_block_equals_the_plain_formula():
    torch.manual_seed(0)
    block = BottleneckBlock(8, 16, (3, 3, 3, 1), gain=0.25)
    hidden = torch.randn(2, 8, 5, 5)
    out = hidden
    for layer, side in ((block.conv_1, 3), (block.conv_2, 3), (block.conv_3, 3), (block.conv_4, 1)):
        assert layer.kernel_size == (side, side)
        out = F.conv2d(out.relu(), layer.weight, layer.bias, padding=side // 2)
    expected = F.conv2d(hidden, block.id_path.weight, block.id_path.bias) + 0.25 * out
    torch.testing.assert_close(block(hidden), expected)
    same = BottleneckBlock(16, 16, (1, 3, 3, 3), gain=0.0)
    assert torch.equal(same(expected), expected)


def test_weights_start_with_the_variance_of_one_over_their_inputs():
    model = make_dvae(width=64)
    layer = model.encoder.groups[1][0].conv_1
    assert layer.weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert not layer.bias.any()


def test_kl_of_known_shares():
    logits = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
    assert kl_to_uniform(logits).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_to_uniform(torch.zeros(2, 8, 3, 3)).item() == pytest.approx(0, abs=1e-6)
    sure = torch.zeros(1, 8, 1, 2)
    sure[:, 0, :, 0] = 1000  # one position certain, the other uniform: the mean is half of log 8
    assert kl_to_uniform(sure).item() == pytest.approx(math.log(8) / 2)
    assert kl_to_uniform(logits.bfloat16()).dtype == torch.float32


def test_kl_is_weighted_as_published():
    config = preset("dalle-dvae")
    assert config.kl_weight / (config.downsampling**2 * config.in_channels) == pytest.approx(6.6 / 192)
    model = make_dvae(kl_weight=4.8).train()
    model.set_step(10_000, 20_000)
    part = model(make_image()).losses["kl"]
    assert part.weight == pytest.approx(4.8 / 48)  # f4 and 3 channels
    assert part.value.item() == pytest.approx(kl_to_uniform(model.latents(make_image())).item())


@pytest.mark.parametrize("bound", ["relaxed", "hard"])
def test_gumbel_softmax_samples_the_softmax(bound):
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 100, 100)
    shares = gumbel_softmax(logits, 1.0 if bound == "relaxed" else 0.01)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(1, 100, 100))
    chosen = torch.bincount(shares.argmax(dim=1).flatten(), minlength=3) / 10_000
    torch.testing.assert_close(chosen, torch.tensor([0.0, 1.0, 2.0]).softmax(dim=0), atol=0.015, rtol=0)
    assert (shares.max(dim=1).values.mean() > 0.98) == (bound == "hard")


def test_gumbel_noise_of_an_exact_zero_stays_finite(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.zero_())
    assert gumbel_softmax(torch.randn(1, 4, 2, 2), 1 / 16).isfinite().all()


def test_logit_laplace_by_hand():
    image = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)  # y = 0.5 and 0.9
    parameters = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(2.0)])]).view(1, 2, 1, 2)
    first = math.log(2 * 0.25) + 1.0  # b = 1, |logit(0.5) - 1| = 1
    second = math.log(2 * 2 * 0.09) + math.log(9) / 2  # b = 2, |logit(0.9) - 0| = log 9
    assert logit_laplace_loss(parameters, image).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_logit_laplace_is_a_density_and_best_at_its_mean():
    # over the margins too: x beyond [-1, 1] is clamped, so integrate what lies within
    image = torch.linspace(-1, 1, 20_001, dtype=torch.float64).view(1, 1, 1, -1).float()
    parameters = torch.tensor([0.3, -3.0]).view(1, 2, 1, 1).expand(1, 2, 1, 20_001)
    losses = torch.stack([logit_laplace_loss(parameters[..., i:i + 1], image[..., i:i + 1]) for i in range(0, 20_001, 20)])
    density = (-losses).exp()
    assert (density.sum() * 0.8 / 1000).item() == pytest.approx(1, abs=0.01)  # dy = 0.4 dx; b = 0.05, all within the margins
    best = image[0, 0, 0, 20 * int(density.argmax())]
    assert logit_laplace_mean(parameters[..., :1]).item() == pytest.approx(best.item(), abs=2e-3)


def test_logit_laplace_mean_undoes_the_map():
    image = make_image()
    mean = (0.1 + 0.8 * (image + 1) / 2).logit()
    torch.testing.assert_close(logit_laplace_mean(torch.cat([mean, torch.zeros_like(mean)], dim=1)), image)
    extreme = logit_laplace_mean(torch.tensor([-100.0, 0.0]).view(1, 2, 1, 1))
    assert extreme.item() == pytest.approx(-1.25)


def test_logit_laplace_output_trains_without_another_loss():
    model = make_dvae(output="logit_laplace").train()
    result = model(make_image())
    assert result.reconstruction.shape == (3, 3, 16, 16)
    assert model.last_layer.shape[0] == 6
    loss = tokenizer_loss(result, make_image(), TokenizerLossConfig(l1_weight=0))
    assert set(loss.weighted) == {"logit_laplace"}  # the weight of kl is 0 at the first step
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_schedules_are_half_cosines():
    assert [half_cosine(1.0, 0.0, step, 4) for step in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert half_cosine(0.0, 6.6, 1, 4) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)
    assert half_cosine(0.0, 6.6, 0, 0) == 6.6


def test_schedules_follow_the_step_and_reach_their_end_in_a_short_run():
    model = make_dvae(kl_weight=6.6, kl_steps=5000, temperature_steps=150_000)
    assert (model.temperature, model.kl_weight) == (1.0, 0.0)
    assert model.set_step(0, 3_000_000) == {"temperature": 1.0, "kl_weight": 0.0}
    middle = model.set_step(75_000, 3_000_000)
    assert middle == pytest.approx({"temperature": (1 + 1 / 16) / 2, "kl_weight": 6.6})
    assert (model.temperature, model.kl_weight) == (middle["temperature"], middle["kl_weight"])
    assert model.set_step(150_000, 3_000_000) == pytest.approx({"temperature": 1 / 16, "kl_weight": 6.6})
    assert model.set_step(2_999_999, 3_000_000) == pytest.approx({"temperature": 1 / 16, "kl_weight": 6.6})
    assert model.set_step(500, 1000) == pytest.approx({"temperature": (1 + 1 / 16) / 2, "kl_weight": 3.3})
    assert model.set_step(1000, 1000) == pytest.approx({"temperature": 1 / 16, "kl_weight": 6.6})


def test_codes_are_of_the_logits_and_pictures_of_a_noisy_sample_in_training():
    model = make_dvae().train()
    torch.manual_seed(3)
    first = model(make_image())
    second = model(make_image())
    torch.manual_seed(3)
    again = model(make_image())
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codes, model.encode(make_image()))
    assert first.codes[1, 2, 3] == model.latents(make_image())[1, :, 2, 3].argmax()
    assert not torch.equal(first.reconstruction, second.reconstruction)
    assert torch.equal(first.reconstruction, again.reconstruction)  # so a run that restores torch's state resumes exactly
    assert torch.equal(model.eval()(make_image()).reconstruction, model(make_image()).reconstruction)


def test_a_cold_sample_is_made_of_single_code_vectors():
    model = make_dvae(temperature_end=1e-4).train()
    model.set_step(1000, 1000)
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(make_image())
    vectors = seen[0].permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.cdist(vectors, model.codebook).min(dim=1).values.max() < 1e-2


def test_logits_are_float32_under_autocast_and_in_bfloat16():
    model = make_dvae().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.latents(make_image()).dtype == torch.float32
    assert model.bfloat16().latents(make_image().bfloat16()).dtype == torch.float32


def test_training_lowers_the_loss_of_the_hard_codes_and_uses_them():
    model = make_dvae()
    image = F.interpolate(torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1, size=16)  # flat patches
    before = F.l1_loss(model.eval()(image).reconstruction, image)
    trained(model, 100, image).eval()
    assert F.l1_loss(model.decode(model.encode(image)), image) < 0.5 * before
    assert model.encode(image).unique().numel() > 3  # no collapse


@pytest.mark.parametrize(("change", "message"), [
    ({"resolution": 18}, r"resolution 18 is not divisible by 4 \(3 groups\); use 16"),
    ({"width": 18}, "width 18 is not divisible by 4 .*; use 16"),
    ({"temperature_end": 2.0}, "temperature_end 2.0 is above temperature_start 1.0"),
    ({"temperature_end": 0.0}, "temperature_end: .*got 0.0"),
    ({"groups": 0}, "groups: .*got 0"),
    ({"output": "pixel"}, "output: .*'pixels' or 'logit_laplace'.*got 'pixel'"),
    ({"kl_wieght": 1.0}, "unknown key 'kl_wieght'; did you mean 'kl_weight'")])
def test_impossible_configs_are_refused_with_value_and_remedy(change, message):
    with pytest.raises(UserError, match=message):
        DVAEConfig.parse({**DEBUG.plain(), **change}, "config.json")


@pytest.mark.parametrize("change", [
    {"codebook_size": 32}, {"embed_dim": 4}, {"width": 32}, {"groups": 2}, {"blocks_per_group": 2},
    {"output": "logit_laplace"}, {"kl_weight": 1.0}, {"kl_steps": 2}, {"temperature_start": 2.0},
    {"temperature_end": 0.5}, {"temperature_steps": 2}], ids=str)
def test_each_config_field_changes_training(change):
    def outcome(model: DVAE) -> float:
        return float(sum(p.detach().double().abs().sum() for p in trained(model, 3, make_image()).parameters()))

    assert outcome(make_dvae(**change)) != outcome(make_dvae())
