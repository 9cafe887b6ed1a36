"""tokenizer_image/adversarial.py against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.small_discriminators import SMALL, each_small, make, pictures
from tokenizer_image.adversarial import (
    AdversarialConfig,
    LeCAM,
    adaptive_weight,
    discriminator_active,
    discriminator_loss,
    discriminator_objective,
    generator_loss,
    generator_weight,
    r1_factor,
    r1_penalty,
    warmin,
)
from tokenizer_image.discriminators import (
    DiscriminatorConfig,
    build_discriminator,
)
from tokenloom_common.errors import UserError


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


# the losses

def test_hinge_by_hand():
    real, fake = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [0.0]])
    assert discriminator_loss(real, fake, "hinge").item() == 0.5 * (0.25 + 0.5)
    assert generator_loss(fake, "hinge").item() == 1.5


def test_non_saturating_by_hand():
    real, fake = torch.tensor([[2.0], [0.5]]), torch.tensor([[-3.0], [1.0]])
    expected = 0.5 * ((softplus(-2.0) + softplus(-0.5)) / 2 + (softplus(-3.0) + softplus(1.0)) / 2)
    assert discriminator_loss(real, fake, "non_saturating").item() == pytest.approx(expected)
    assert generator_loss(fake, "non_saturating").item() == pytest.approx((softplus(3.0) + softplus(-1.0)) / 2)


def test_hinge_gradients_push_apart_up_to_the_margin_and_the_generator_pushes_up():
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    discriminator_loss(real, fake, "hinge").backward()
    assert real.grad.tolist() == [0.0, -0.25]
    assert fake.grad.tolist() == [0.0, 0.25]
    fake.grad = None
    generator_loss(fake, "hinge").backward()
    assert fake.grad.tolist() == [-0.5, -0.5]


def test_non_saturating_keeps_real_and_fake_apart():
    """Cross-entropy with the logits as its first argument; a swap makes the generator's gradient vanish or turn."""
    good, bad = torch.tensor([4.0]), torch.tensor([-4.0])
    assert discriminator_loss(good, bad, "non_saturating") < 0.1 < discriminator_loss(bad, good, "non_saturating")
    assert generator_loss(good, "non_saturating") < 0.1 < generator_loss(bad, "non_saturating")
    logits = torch.tensor([-4.0, 0.3, 4.0])
    ones, zeros = torch.ones(3), torch.zeros(3)
    by_entropy = 0.5 * (F.binary_cross_entropy_with_logits(logits, ones) + F.binary_cross_entropy_with_logits(-logits, zeros))
    torch.testing.assert_close(discriminator_loss(logits, -logits, "non_saturating"), by_entropy)
    fake = torch.tensor([-20.0], requires_grad=True)
    generator_loss(fake, "non_saturating").backward()
    assert fake.grad.item() == pytest.approx(-1.0)  # a fake that is found out learns the most


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_losses_are_float32_scalars_of_any_logits(kind):
    logits = torch.full((2, 1, 2, 2), 0.1, dtype=torch.bfloat16)
    for loss in (generator_loss(logits, kind), discriminator_loss(logits, logits, kind)):
        assert (loss.dtype, loss.shape) == (torch.float32, ())
    exact = generator_loss(logits.float(), kind)
    assert torch.equal(generator_loss(logits, kind), exact)


def test_an_unknown_loss_lists_the_names():
    with pytest.raises(UserError, match=r"unknown adversarial loss 'hing'; did you mean 'hinge'"):
        generator_loss(torch.zeros(1), "hing")
    with pytest.raises(UserError, match="valid names: hinge, non_saturating"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wasserstein")


# the generator's weight

def linear_losses(reconstruction: float, adversarial: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A last layer [1, 2] over features (3, 4): its gradients have the lengths 5 |factor|."""
    last_layer = torch.tensor([[1.0, 2.0]], requires_grad=True)
    output = F.linear(torch.tensor([[3.0, 4.0]]), last_layer).sum()
    return output * reconstruction, output * adversarial, last_layer


def test_adaptive_weight_by_hand():
    losses = linear_losses(1.0, -2.0)
    weight = adaptive_weight(*losses, maximum=1e4)
    assert weight.item() == pytest.approx(5 / 10.0001, rel=1e-6)
    assert (weight.dtype, weight.shape, weight.requires_grad) == (torch.float32, (), False)
    assert adaptive_weight(*losses, maximum=0.25).item() == 0.25
    assert losses[2].grad is None
    (losses[0] + weight * losses[1]).backward()  # the graphs are still there
    torch.testing.assert_close(losses[2].grad, (1 - 2 * weight) * torch.tensor([[3.0, 4.0]]))


@pytest.mark.parametrize(("reconstruction", "adversarial", "expected"), [
    (1.0, 0.0, 1e4), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (math.nan, 1.0, 0.0), (1.0, math.nan, 0.0), (math.inf, 1.0, 0.0),
    (1.0, math.inf, 0.0), (math.inf, math.inf, 0.0), (math.nan, 0.0, 0.0), (math.inf, 0.0, 0.0)])
def test_adaptive_weight_of_zero_and_broken_gradients_is_finite(reconstruction, adversarial, expected):
    assert adaptive_weight(*linear_losses(reconstruction, adversarial), maximum=1e4).item() == expected


def test_the_generators_weight_is_the_product_of_its_parts():
    losses = linear_losses(1.0, 2.0)
    config = AdversarialConfig(weight=0.8, start_step=1, warmin_steps=4)
    assert generator_weight(0, config, *losses).item() == 0.0
    assert generator_weight(2, config, *losses).item() == pytest.approx(0.8 * 0.5 * 0.5, rel=1e-4)
    fixed = config.model_copy(update={"adaptive": False})
    assert generator_weight(2, fixed, *losses).item() == pytest.approx(0.4)
    assert generator_weight(9, AdversarialConfig(), *losses).item() == 0.0
    unrelated = torch.tensor(1.0)  # no gradient is asked for while the weight is 0
    assert generator_weight(0, config, unrelated, unrelated, losses[2]).item() == 0.0


# when

def test_warmin_values():
    config = AdversarialConfig(weight=1.0, start_step=2, head_start_steps=3, warmin_steps=4)
    assert [warmin(step, config) for step in range(11)] == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [discriminator_active(step, config) for step in range(4)] == [False, False, True, True]


def test_without_warmin_the_full_weight_comes_at_once():
    config = AdversarialConfig(weight=1.0, start_step=2)
    assert [warmin(step, config) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert warmin(0, AdversarialConfig(weight=1.0)) == 1.0


def test_without_a_weight_there_is_no_discriminator():
    assert not any(discriminator_active(step, AdversarialConfig()) for step in (0, 10, 1_000_000))


def test_r1_is_lazy_and_keeps_its_mean_strength():
    config = AdversarialConfig(weight=1.0, start_step=2, r1_weight=10.0, r1_every=4)
    assert [r1_factor(step, config) for step in range(11)] == [0, 0, 20, 0, 0, 0, 20, 0, 0, 0, 20]
    every = AdversarialConfig(weight=1.0, r1_weight=10.0, r1_every=1)
    assert r1_factor(3, every) == 5.0  # gamma/2


# R1

class Linear(nn.Module):
    """Logits w.x, one for each row of w, as a map [B, 1, 1, rows]."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(rows))

    def forward(self, image):
        return F.linear(image.flatten(1), self.weight)[:, None, None, :]


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    discriminator = Linear([[1.0, -2.0, 2.0]])
    image = torch.randn(5, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    penalty = r1_penalty(discriminator, image)
    assert penalty.item() == 9.0
    penalty.backward()
    assert discriminator.weight.grad.tolist() == [[2.0, -4.0, 4.0]]
    assert not image.requires_grad


def test_r1_of_a_map_is_that_of_its_mean():
    assert r1_penalty(Linear([[1.0, 0.0], [3.0, 4.0]]), torch.zeros(2, 1, 1, 2)).item() == 2.0**2 + 2.0**2


@each_small
def test_r1_reaches_every_weight(options):
    """Biases behind the last norm only move kinks: the gradient of a piecewise linear function does not hold them."""
    discriminator = make(**options)
    penalty = r1_penalty(discriminator, pictures())
    penalty.backward()
    assert penalty > 0
    without = [name for name, p in discriminator.named_parameters() if p.ndim > 1 and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in discriminator.parameters())


@each_small
def test_r1_gradients_obey_eulers_theorem(options):
    """R1 is quadratic in a factor of the last weight, and without norms and biases of every weight: w.grad = 2 R1."""
    discriminator = make(**options)
    penalty = r1_penalty(discriminator, pictures())
    penalty.backward()
    weights = [p for p in discriminator.parameters() if p.ndim > 1]
    for weight in weights if options.get("norm") == "none" else weights[-1:]:
        assert (weight * weight.grad).sum().item() == pytest.approx(2 * penalty.item(), rel=1e-4)


# LeCAM

def test_lecam_by_hand():
    lecam = LeCAM(decay=0.75)
    real, fake = torch.tensor([[3.0], [1.0]]), torch.tensor([[-2.0], [0.0]])
    assert lecam(real, fake).item() == 0.0  # nothing to compare with yet
    lecam.update(real, fake)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (2.0, -1.0)
    assert lecam(real, fake).item() == (4**2 + 2**2) / 2 + (4**2 + 2**2) / 2
    lecam.update(torch.tensor([6.0]), torch.tensor([3.0]))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (3.0, 0.0)
    # a logit on the wrong side of the other average is not held back
    assert lecam(torch.tensor([-5.0, 2.0]), torch.tensor([8.0, 1.0])).item() == 2**2 / 2 + 2**2 / 2


def test_lecam_pulls_real_logits_down_and_fake_ones_up():
    lecam = LeCAM()
    real, fake = torch.tensor([2.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    lecam.update(real, fake)
    lecam(real, fake).backward()
    assert (real.grad.item(), fake.grad.item()) == (6.0, -6.0)


def test_lecam_survives_a_checkpoint():
    lecam, again = LeCAM(0.5), LeCAM(0.5)
    lecam.update(torch.tensor([1.0]), torch.tensor([-3.0]))
    assert set(lecam.state_dict()) == {"ema_real", "ema_fake", "initialized"}
    again.load_state_dict(lecam.state_dict())
    for each in (lecam, again):
        each.update(torch.tensor([2.0]), torch.tensor([1.0]))
    assert (again.ema_real.item(), again.ema_fake.item()) == (1.5, -1.0) == (lecam.ema_real.item(), lecam.ema_fake.item())


def test_lecam_averages_over_processes_before_it_moves():
    lecam = LeCAM()
    lecam.update(torch.tensor([1.0]), torch.tensor([2.0]), reduce=lambda means: (means + torch.tensor([3.0, 6.0])) / 2)
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (2.0, 4.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_lecam_leaves_out_logits_that_are_not_finite(broken):
    lecam = LeCAM(0.5)
    lecam.update(torch.tensor([broken]), torch.tensor([0.0]))
    assert not lecam.initialized
    lecam.update(torch.tensor([1.0]), torch.tensor([-1.0]))
    lecam.update(torch.tensor([5.0]), torch.tensor([broken]))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (1.0, -1.0)


# all of it together

FULL = {"weight": 1.0, "lecam_weight": 0.5, "r1_weight": 10.0}


@each_small
def test_every_parameter_gets_a_gradient(options):
    # not hinge: inside its margin the slopes at real and at fake logits cancel in the last bias
    model, config = make(**options), AdversarialConfig(**FULL, loss="non_saturating")
    loss = discriminator_objective(model, pictures(seed=1), pictures(seed=2), 0, config, LeCAM(config.lecam_decay))
    loss.total.backward()
    assert set(loss.terms) == {"discriminator", "lecam", "r1"}
    assert not any(term.requires_grad for term in loss.terms.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_objective_is_the_weighted_sum_of_its_terms():
    model, config, lecam = make(**SMALL[0]), AdversarialConfig(**FULL, r1_every=4), LeCAM(0.0)
    real, fake = pictures(seed=1), pictures(seed=2).requires_grad_()
    loss = discriminator_objective(model, real, fake, 0, config, lecam)
    terms = loss.terms
    torch.testing.assert_close(loss.total, terms["discriminator"] + 0.5 * terms["lecam"] + 20 * terms["r1"])
    torch.testing.assert_close(terms["r1"], r1_penalty(model, real).detach())
    torch.testing.assert_close(lecam.ema_real, model(real).mean().detach())
    torch.testing.assert_close(lecam.ema_fake, model(fake).mean().detach())
    loss.total.backward()
    assert fake.grad is None
    assert set(discriminator_objective(model, real, fake, 1, config, lecam).terms) == {"discriminator", "lecam"}


def test_terms_without_a_weight_are_not_computed_and_change_nothing():
    model, real, fake = make(**SMALL[0]), pictures(seed=1), pictures(seed=2)
    loss = discriminator_objective(model, real, fake, 0, AdversarialConfig(weight=1.0))
    assert set(loss.terms) == {"discriminator"}
    assert torch.equal(loss.total, discriminator_loss(model(real), model(fake), "hinge"))


@each_small
def test_a_discriminator_learns_to_tell_two_kinds_of_pictures(options):
    model, config, lecam = make(**options), AdversarialConfig(weight=1.0, r1_weight=0.1, lecam_weight=0.001), LeCAM()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    rough = pictures(8)
    smooth = F.interpolate(F.avg_pool2d(rough, 4), scale_factor=4.0)
    for step in range(20):
        optimizer.zero_grad()
        discriminator_objective(model, rough, smooth, step, config, lecam).total.backward()
        optimizer.step()
    assert model(rough).mean() > model(smooth).mean() + 0.5


CHANGES = {"weight": 0.5, "loss": "non_saturating", "start_step": 3, "head_start_steps": 2, "warmin_steps": 3,
           "adaptive": False, "max_adaptive_weight": 1e-3, "lecam_weight": 0.7, "lecam_decay": 0.5, "r1_weight": 1.0,
           "r1_every": 2, "discriminator": DiscriminatorConfig(channels=8, layers=1)}


def what_happens(config: AdversarialConfig) -> list[float]:
    """Weights of the generator and losses of the discriminator over a few steps."""
    torch.manual_seed(0)
    model, lecam = build_discriminator(config.discriminator, 16), LeCAM(config.lecam_decay)
    values = []
    for step in range(5):
        real, fake = pictures(seed=step), pictures(seed=100 + step)
        last_layer = torch.ones(3, 1, 1, requires_grad=True)
        reconstruction = fake * last_layer
        adversarial = generator_loss(model(reconstruction), config.loss)
        values.append(generator_weight(step, config, F.l1_loss(reconstruction, real), adversarial, last_layer).item())
        if discriminator_active(step, config):
            values.append(discriminator_objective(model, real, fake, step, config, lecam).total.item())
    return values


@pytest.mark.parametrize("field", AdversarialConfig.model_fields)
def test_every_option_changes_what_happens(field):
    base = AdversarialConfig(**FULL, discriminator=DiscriminatorConfig(channels=8, layers=2))
    assert what_happens(base) == what_happens(base)
    assert what_happens(base) != what_happens(base.model_copy(update={field: CHANGES[field]}))


@pytest.mark.parametrize(("values", "words"), [
    ({"r1_weight": 10}, "r1_weight 10 has no effect without a discriminator.*set weight above 0, or r1_weight to 0"),
    ({"lecam_weight": 0.05}, r"lecam_weight 0\.05 has no effect"), ({"weight": -1}, "weight"), ({"loss": "wgan"}, "loss"),
    ({"start_step": -1}, "start_step"), ({"head_start_steps": -1}, "head_start_steps"), ({"warmin_steps": -1}, "warmin_steps"),
    ({"max_adaptive_weight": 0}, "max_adaptive_weight"), ({"lecam_decay": 1}, "lecam_decay"), ({"r1_every": 0}, "r1_every"),
    ({"weight": float("nan")}, "weight"), ({"discriminator": {"norm": "group", "kind": "stylegan"}}, "norm group has no"),
    ({"discriminator": {"layer": 3}}, "did you mean 'discriminator.layers'")])
def test_impossible_adversarial_configs_are_refused(values, words):
    with pytest.raises(UserError, match=words) as caught:
        AdversarialConfig.parse(values, "adversarial")
    assert "\n" not in str(caught.value)


def test_a_config_written_out_whole_reads_back():
    for config in (AdversarialConfig(), AdversarialConfig(**FULL, discriminator=DiscriminatorConfig(kind="stylegan"))):
        assert AdversarialConfig.parse(config.plain(), "adversarial") == config
