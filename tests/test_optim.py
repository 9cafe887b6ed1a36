"""Optimizers and learning rates of the published recipes: by hand, against NumPy, and through DeepSpeed."""

# Axes: R rows and M columns of a weight, B batch

from __future__ import annotations

import copy
import io
import itertools
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tokenloom_common.errors import UserError
from training.config.loading import dump_config, load_config
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.optim import OPTIMIZERS, SCHEDULES, Adafactor, build_optimizer, lr_at
from training.engine.processes import Processes

PARTI = {"name": "adafactor", "lr": 4.5e-5, "betas": (0.9, 0.96), "weight_decay": 0.045, "warmup_steps": 5000,
         "schedule": "exponential", "decay_start_step": 85_000, "final_lr_ratio": 0.025, "gradient_clipping": 4.0}
DALLE = {"lr": 4.5e-4, "betas": (0.9, 0.96), "weight_decay": 0.045, "warmup_steps": 5000, "schedule": "halving",
         "halve_at_steps": [100_000, 200_000, 300_000, 350_000, 400_000]}
EXAMPLES = {"halving": {"halve_at_steps": (6, 8)}}  # what a schedule cannot do without
CHOICES = {name: OptimConfig(lr=2.0, warmup_steps=4, schedule=name, final_lr_ratio=0.1, **EXAMPLES.get(name, {}))
           for name in SCHEDULES}


def rates(optim: OptimConfig, total: int, *steps: int) -> list[float]:
    return [lr_at(step, total, optim) for step in steps]


def run_config(stage: int = 0, **optim) -> RunConfig:
    """Numbers for which warm-up, clipping and decay all show within a few steps."""
    values = {"lr": 0.02, "warmup_steps": 2, "weight_decay": 0.3, "gradient_clipping": 0.5, **optim}
    return RunConfig.parse({"run_dir": "unused", "train": {"steps": 8, "batch_size": 8}, "deepspeed": {"zero_stage": stage},
                            "optim": values}, "test")


# ---- the learning rate ----

def test_the_learning_rate_of_parti():
    parti = OptimConfig(**PARTI)
    found = rates(parti, 450_000, 0, 2499, 4999, 5000, 84_999, 85_000, 267_500, 450_000)
    middle = 4.5e-5 * math.sqrt(0.025)  # half of the way in steps is half of the way in the logarithm
    assert found == pytest.approx([9e-9, 2.25e-5, 4.5e-5, 4.5e-5, 4.5e-5, 4.5e-5, middle, 1.125e-6], rel=1e-12)
    assert lr_at(85_001, 450_000, parti) / 4.5e-5 == pytest.approx(0.025 ** (1 / 365_000), rel=1e-12)


def test_an_exponential_decay_without_a_start_begins_after_the_warm_up():
    optim = OptimConfig(lr=1.0, warmup_steps=2, schedule="exponential", final_lr_ratio=0.25)
    assert rates(optim, 6, 0, 1, 2, 3, 4, 6, 99) == pytest.approx([0.5, 1, 1, 0.25**0.25, 0.5, 0.25, 0.25])


def test_the_learning_rate_of_dalle():
    found = rates(OptimConfig(**DALLE), 430_000, 2499, 4999, 99_999, 100_000, 199_999, 200_000, 300_000, 350_000, 429_999)
    assert [rate / 4.5e-4 for rate in found] == pytest.approx([0.5, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])


def test_inverse_square_root_and_linear_by_hand():
    inverse = OptimConfig(lr=1.0, warmup_steps=4, schedule="inverse_sqrt")
    assert rates(inverse, 100, 0, 1, 2, 3, 4, 16, 64, 10_000) == [0.25, 0.5, 0.75, 1, 1, 0.5, 0.25, 0.02]
    linear = OptimConfig(lr=1.0, warmup_steps=4, schedule="linear", final_lr_ratio=0.2)
    assert rates(linear, 12, 1, 3, 4, 6, 8, 12, 99) == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.2, 0.2])
    to_zero = OptimConfig(lr=1.0, warmup_steps=0, schedule="linear", final_lr_ratio=0.0)
    assert rates(to_zero, 4, 0, 1, 2, 3, 4) == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_then_never_rises_and_ends_where_it_says(name):
    found = rates(CHOICES[name], 20, *range(21))
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(before >= after for before, after in itertools.pairwise(found[4:]))
    ends = {"constant": 1, "halving": 0.25, "inverse_sqrt": math.sqrt(4 / 20)}
    assert found[20] == pytest.approx(2.0 * ends.get(name, 0.1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_ends_within_its_warm_up_has_a_learning_rate(name):
    assert rates(CHOICES[name], 3, 0, 1, 2, 3) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(("warmup", "total", "ratio"), [(50, 1000, 0.05), (0, 7, 0.0), (10, 3, 0.5), (3, 3, 1.0)])
def test_cosine_and_constant_are_what_they_were_to_the_bit(warmup, total, ratio):
    """Runs from before the other schedules go on as they began."""
    for step in range(total + 5):
        cosine = OptimConfig(lr=0.3, warmup_steps=warmup, final_lr_ratio=ratio)
        if step < warmup:
            expected = 0.3 * (step + 1) / warmup
        else:
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            expected = 0.3 * (ratio + (1 - ratio) * (0.5 * (1 + math.cos(math.pi * progress))))
        assert lr_at(step, total, cosine).hex() == expected.hex()
        constant = OptimConfig(lr=0.3, warmup_steps=warmup, schedule="constant")
        assert lr_at(step, total, constant) == (expected if step < warmup else 0.3)


# ---- Adafactor against the paper ----

def reference(weights: numpy.ndarray, gradients: list[numpy.ndarray], lr: list[float], beta1: float, beta2: float, decay: float,
              clipping: float, scaled: bool, factored: bool) -> numpy.ndarray:
    """Adafactor from the equations of Shazeer & Stern 2018, in float64.

    Sums as in their algorithm 4, and the fixed beta2 of Adam with its bias correction as a division, where ours has means
    and their section 7.1's decay that depends on the step.
    """
    weights = weights.astype(numpy.float64)
    rows, columns, whole, first = 0.0, 0.0, 0.0, numpy.zeros_like(weights)
    for t, gradient in enumerate(gradients, start=1):
        square = gradient.astype(numpy.float64) ** 2 + 1e-30
        correction = 1 - beta2**t
        if factored:
            matrix = square.reshape(len(square), -1)
            rows = beta2 * rows + (1 - beta2) * matrix.sum(1)
            columns = beta2 * columns + (1 - beta2) * matrix.sum(0)
            estimate = numpy.outer(rows / correction, columns / correction) / (rows / correction).sum()
            estimate = estimate.reshape(square.shape)
        else:
            whole = beta2 * whole + (1 - beta2) * square
            estimate = whole / correction
        update = gradient / numpy.sqrt(estimate)
        update = update / max(1.0, math.sqrt((update**2).mean()) / clipping)
        step_size = lr[t - 1] * (max(1e-3, math.sqrt((weights**2).mean())) if scaled else 1.0)
        first = beta1 * first + (1 - beta1) * step_size * update
        weights = weights - first - lr[t - 1] * decay * weights
    return weights


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int, seed: int) -> Tensor:
    """Rows, columns and steps of very different size: what a mean over the wrong axis would give differs."""
    tensor = seeded(*shape, seed=seed) * (1 + 3 * seed % 5)
    for axis, size in enumerate(shape):
        tensor = tensor * torch.linspace(0.1, 4, size).view([-1 if axis == i else 1 for i in range(len(shape))])
    return tensor


def step_with(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, Tensor], lr: float | None = None) -> None:
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.clone()
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    optimizer.step()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7,), (6, 2, 2, 3), (3, 40)], ids=str)
@pytest.mark.parametrize(("betas", "decay", "clipping", "scaled"), [
    ((0.9, 0.96), 0.045, 1.0, False), ((0.0, 0.96), 0.0, 1.0, False), ((0.5, 0.8), 0.5, 0.3, True),
    ((0.9, 0.0), 0.0, 9.0, False)])
def test_adafactor_equals_the_papers_equations(shape, betas, decay, clipping, scaled):
    gradients = [uneven(*shape, seed=step) for step in range(1, 7)]
    lr = [0.1, 0.2, 0.2, 0.05, 0.05, 0.01]
    weight = nn.Parameter(seeded(*shape))
    optimizer = Adafactor([weight], lr[0], betas, decay, clipping, scaled, factored_from=6)
    factored = len(shape) > 1 and shape[0] >= 6
    for step, gradient in enumerate(gradients):
        step_with(optimizer, {weight: gradient}, lr[step])
        expected = reference(seeded(*shape).numpy(), [g.numpy() for g in gradients[: step + 1]], lr, *betas, decay, clipping,
                             scaled, factored)
        numpy.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5, atol=2e-6)
    assert ("rows" in optimizer.state[weight]) == factored


def test_the_first_step_of_a_vector_by_hand():
    """The first moment holds a tenth of the signs; 2 of 4 numbers have no gradient, so the update's size is below 1."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    optimizer = Adafactor([weight], lr=0.5, weight_decay=0.2)
    step_with(optimizer, {weight: torch.tensor([3.0, 0.0, -0.01, 0.0])})
    assert weight.tolist() == pytest.approx([0.9 - 0.05, 0.9, 0.9 + 0.05, 0.9])
    assert optimizer.state[weight]["momentum"].tolist() == pytest.approx([0.05, 0, -0.05, 0])


def test_an_update_is_never_larger_than_the_clipping():
    weight = nn.Parameter(torch.zeros(8))
    optimizer = Adafactor([weight], lr=1.0, betas=(0.0, 0.96), update_clipping=0.25)
    for size in (1.0, 1.0, 1000.0):  # the running moment is far too small for the last one
        before = weight.detach().clone()
        step_with(optimizer, {weight: torch.full((8,), size)})
        assert float((weight.detach() - before).square().mean().sqrt()) == pytest.approx(0.25, rel=1e-5)


def test_steps_scaled_by_the_weights_are_in_proportion_to_them():
    for size, expected in ((4.0, 4.0), (0.5, 0.5), (0.0, 1e-3)):
        weight = nn.Parameter(torch.full((8,), size))
        step_with(Adafactor([weight], 0.1, (0.0, 0.96), parameter_scaling=True), {weight: torch.ones(8)})
        assert float(size - weight[0]) == pytest.approx(0.1 * expected, rel=1e-4)


def test_rows_and_columns_without_a_gradient_stay_as_they_are():
    """Their second moments are 1e-30 each, and the product of two such is 0 in float32."""
    weight = nn.Parameter(seeded(8, 8))
    before = weight.detach().clone()
    optimizer = Adafactor([weight], 0.1, factored_from=4)
    gradient = seeded(8, 8, seed=1) * 100
    gradient[3] = gradient[:, 5] = 0
    for _ in range(3):
        step_with(optimizer, {weight: gradient})
    assert bool(weight.isfinite().all())
    assert torch.equal(weight[3], before[3])
    assert torch.equal(weight[:, 5], before[:, 5])
    assert not torch.isclose(weight, before)[gradient != 0].any()
    step_with(Adafactor([weight], 0.1, factored_from=4), {weight: torch.zeros(8, 8)})
    assert bool(weight.isfinite().all())


def test_what_has_no_gradient_has_no_state():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adafactor([used, unused], 0.1, weight_decay=0.5)
    step_with(optimizer, {used: torch.ones(2)})
    assert list(optimizer.state) == [used]
    assert unused.tolist() == [1, 1]


def test_a_closure_gives_its_loss():
    weight = nn.Parameter(torch.ones(3))
    optimizer = Adafactor([weight], 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3.0
    assert float(weight.detach().max()) < 1


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_moments_that_never_move_are_refused(betas):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Adafactor([nn.Parameter(torch.ones(2))], 0.1, betas)
    with pytest.raises(UserError, match="betas"):
        run_config(betas=betas)


# ---- its memory ----

def state_sizes(shape: tuple[int, ...], betas: tuple[float, float] = (0.9, 0.96)) -> dict[str, int]:
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Adafactor([weight], 0.1, betas)
    step_with(optimizer, {weight: torch.ones(shape)})
    return {name: value.numel() for name, value in optimizer.state[weight].items() if torch.is_tensor(value)}


@pytest.mark.parametrize(("shape", "second"), [
    ((128, 512), {"rows": 128, "columns": 512}), ((512, 128), {"rows": 512, "columns": 128}),
    ((256, 32, 3, 3), {"rows": 256, "columns": 288}), ((127, 512), {"square": 127 * 512}), ((512, 127), {"square": 127 * 512}),
    ((4096,), {"square": 4096}), ((1, 600, 200), {"square": 120_000}), ((), {"square": 1})], ids=str)
def test_matrices_with_two_long_sides_hold_rows_and_columns_others_hold_all(shape, second):
    size = math.prod(shape)
    assert state_sizes(shape) == {"momentum": size, **second}
    assert state_sizes(shape, (0.0, 0.96)) == second


def test_its_state_is_half_of_adamws_and_less_than_a_hundredth_without_a_first_moment():
    sizes = {}
    for name, betas in (("adamw", (0.9, 0.96)), ("adafactor", (0.9, 0.96)), ("adafactor", (0.0, 0.96))):
        module = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 256))
        optimizer = build_optimizer(module, OptimConfig(name=name, betas=betas))
        step_with(optimizer, {parameter: torch.ones_like(parameter) for parameter in module.parameters()})
        sizes[name, betas[0]] = sum(value.numel() for state in optimizer.state.values() for value in state.values()
                                    if torch.is_tensor(value) and value.ndim)
    assert sizes["adafactor", 0.9] == pytest.approx(0.5 * sizes["adamw", 0.9], rel=0.01)
    assert sizes["adafactor", 0.0] < 0.01 * sizes["adamw", 0.9]


# ---- training with it ----

class Small(nn.Module):
    """A weight that is factored, one that is not, an embedding, gains and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 128)
        self.first = nn.Linear(128, 160)
        self.norm = nn.LayerNorm(160)
        self.last = nn.Linear(160, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(self.embedding(ids)))))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


def batch(step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids [B] and a target [B, 3] that can be learned, with noise."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 5, (8,), generator=generator)
    target = seeded(5, 3)[ids] + 0.1 * torch.randn(8, 3, generator=generator)
    return ids.to(device), target.to(device)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def plain_train(module: nn.Module, run: RunConfig, steps: range, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """In PyTorch alone, on the module's device -> losses."""
    optimizer = optimizer or build_optimizer(module, run.optim)
    device = next(module.parameters()).device
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, run.train.steps, run.optim)
        ids, target = batch(step, device)
        loss = squared_error(module(ids), target)
        optimizer.zero_grad()
        loss.backward()
        if run.optim.gradient_clipping:
            nn.utils.clip_grad_norm_(module.parameters(), run.optim.gradient_clipping)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def engine_for(module: nn.Module, run: RunConfig, group: Processes, precision: str = "float32") -> Engine:
    return Engine(module, build_optimizer(module, run.optim), run, group, precision)


def train(engine: Engine, group: Processes, steps: range) -> list[float]:
    """The loop of training/loop/loop.py without its log -> losses."""
    losses = []
    for step in steps:
        engine.set_lr(engine.lr_of(step))
        ids, target = batch(step, group.device)
        loss = squared_error(engine(ids), target)
        engine.backward(loss, step + 1)
        engine.step(step + 1)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name):
    run = RunConfig.parse({"run_dir": "r", "train": {"steps": 60}, "deepspeed": {"zero_stage": 0}, "optim": {
        "name": name, "lr": 0.003, "betas": [0.9, 0.96], "warmup_steps": 5, "weight_decay": 0.045}}, "test")
    losses = plain_train(small(), run, range(60))
    assert sum(losses[-5:]) < 0.1 * sum(losses[:5])


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_saved_and_loaded_it_continues_to_the_bit(beta1):
    run, module = run_config(name="adafactor", betas=(beta1, 0.96)), small()
    optimizer = build_optimizer(module, run.optim)
    plain_train(module, run, range(4), optimizer)
    file = io.BytesIO()
    torch.save({"weights": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    expected = plain_train(module, run, range(4, 8), optimizer)
    fresh, weights_only = small(seed=1), small(seed=1)
    for other in (fresh, weights_only):
        other.load_state_dict(saved["weights"])
    loaded = build_optimizer(fresh, run.optim)
    loaded.load_state_dict(saved["optimizer"])
    assert plain_train(fresh, run, range(4, 8), loaded) == expected
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True))
    assert plain_train(weights_only, run, range(4, 8)) != expected  # so the state matters


def test_deepspeed_on_one_process_equals_a_plain_loop_with_adafactor(group):
    run, module = run_config(name="adafactor", betas=(0.9, 0.96), schedule="exponential", decay_start_step=4), small()
    plain = copy.deepcopy(module).to(group.device)
    expected = plain_train(plain, run, range(8))
    engine = engine_for(module, run, group)
    assert train(engine, group, range(8)) == pytest.approx(expected, abs=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(engine.full_state()[name], value.cpu(), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert "rows" in engine.optimizer.state[engine.module.first.weight]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_engine_with_adafactor_saves_and_continues_to_the_bit(group, precision, tmp_path: Path):
    run = run_config(name="adafactor", betas=(0.9, 0.96))
    engine = engine_for(small(), run, group, precision)
    train(engine, group, range(4))
    engine.save(tmp_path)
    expected = train(engine, group, range(4, 8))
    fresh = engine_for(small(seed=1), run, group, precision)
    fresh.load(tmp_path)
    assert train(fresh, group, range(4, 8)) == expected
    states = [e.full_state() for e in (engine, fresh)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_step_that_is_not_finite_leaves_weights_and_state_alone(group):
    run = run_config(name="adafactor")
    engine = engine_for(small(), run, group)
    train(engine, group, range(2))
    before = copy.deepcopy((engine.full_state(), engine.optimizer.state_dict()["state"]))
    engine.backward(squared_error(engine(batch(2, group.device)[0]), torch.tensor(math.nan)), 3)
    assert engine.step(3)[1] == 1
    weights, state = engine.full_state(), engine.optimizer.state_dict()["state"]
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][number][key]))
               for number, values in state.items() for key, value in values.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_bfloat16_nothing_moves_before_the_first_step(group, name):
    """DeepSpeed's wrapper for stage 0 takes a step of its own at the peak learning rate, with gradients of 0."""
    module = small()
    expected = {key: value.bfloat16().float() for key, value in module.state_dict().items()}
    engine = engine_for(module, run_config(name=name), group, "bfloat16")
    found = engine.full_state()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    train(engine, group, range(1))
    assert {int(state["step"]) for state in engine.optimizer.state.values()} == {1}


def test_in_bfloat16_adafactor_trains_float32_copies_with_a_factored_moment(group):
    run = run_config(name="adafactor", betas=(0.9, 0.96))
    engine = engine_for(small(), run, group, "bfloat16")
    losses = train(engine, group, range(8))
    assert losses == pytest.approx(plain_train(small(), run, range(8)), rel=0.1)
    weight = engine.full_state()["first.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # finer than bfloat16
    shapes = {tuple(state["rows"].shape): state for state in engine.optimizer.state.values() if "rows" in state}
    assert list(shapes) == [(160,)]
    assert {value.dtype for value in shapes[160,].values() if torch.is_tensor(value)} == {torch.float32}


@pytest.mark.parametrize("module", [lambda: tiny.seq2seq(learned_positions=True), tiny.vqgan], ids=["seq2seq", "vqgan"])
def test_adafactor_decays_what_adamw_decays(module):
    found = {}
    for name in OPTIMIZERS:
        model = module()
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
        found[name] = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found["adamw"] == found["adafactor"]
    assert set(found["adamw"].values()) == {0.0, 0.3}


# ---- options ----

ADAFACTOR = {"name": "adafactor"}
CHANGES = {  # option -> what it is changed in, and to what
    "name": ({}, "adafactor"), "lr": ({}, 0.03), "weight_decay": (ADAFACTOR, 0.1), "warmup_steps": ({}, 4),
    "update_clipping": (ADAFACTOR, 0.5), "parameter_scaling": (ADAFACTOR, True), "schedule": ({}, "linear"),
    "final_lr_ratio": ({"schedule": "exponential"}, 0.3), "decay_start_step": ({"schedule": "exponential"}, 5),
    "halve_at_steps": ({"schedule": "halving", "halve_at_steps": [5]}, [4]), "gradient_clipping": ({}, 0.1)}
MORE_CHANGES = [*CHANGES.items(), ("betas", (ADAFACTOR, (0.5, 0.95))), ("betas", (ADAFACTOR, (0.9, 0.8))),
                ("final_lr_ratio", ({"schedule": "linear"}, 0.3)), ("final_lr_ratio", ({"schedule": "cosine"}, 0.3)),
                *(("schedule", ({}, name)) for name in SCHEDULES if name not in ("cosine", "halving"))]


def trained(optim: dict) -> Tensor:
    run, module = run_config(**optim), small()
    plain_train(module, run, range(8))
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize(("option", "change"), MORE_CHANGES, ids=lambda value: str(value)[:40])
def test_every_option_changes_the_run(option, change):
    base, value = change
    assert not torch.allclose(trained(base), trained({**base, option: value}), rtol=0, atol=1e-6)


def test_the_tests_above_know_every_option():
    assert {option for option, _ in MORE_CHANGES} == set(OptimConfig.model_fields)
    assert set(OptimConfig.model_fields["schedule"].annotation.__args__) == set(SCHEDULES)
    assert set(OptimConfig.model_fields["name"].annotation.__args__) == set(OPTIMIZERS)


def test_the_gradient_clipping_of_parti_reaches_deepspeed():
    assert deepspeed_json(run_config(gradient_clipping=4.0), 1, "float32", 10)["gradient_clipping"] == 4.0


GIVEN = {"final_lr_ratio": 0.2, "decay_start_step": 5, "halve_at_steps": [5], "update_clipping": 2.0, "parameter_scaling": True}
READ = {("final_lr_ratio", "cosine"), ("final_lr_ratio", "exponential"), ("final_lr_ratio", "linear"),
        ("decay_start_step", "exponential"), ("halve_at_steps", "halving"), ("update_clipping", "adafactor"),
        ("parameter_scaling", "adafactor")}
CASES = [(option, "schedule", name) for option in ("final_lr_ratio", "decay_start_step", "halve_at_steps") for name in SCHEDULES
         ] + [(option, "name", name) for option in ("update_clipping", "parameter_scaling") for name in OPTIMIZERS]


@pytest.mark.parametrize(("option", "choice", "name"), CASES)
def test_an_option_that_is_not_read_is_refused_by_name(option, choice, name):
    values = {**EXAMPLES.get(name, {}), choice: name, option: GIVEN[option]}
    if (option, name) in READ:
        run_config(**values)
        return
    with pytest.raises(UserError, match=rf"optim\.{option} .* is not read with optim\.{choice} '{name}', only with ") as caught:
        run_config(**values)
    assert "\n" not in str(caught.value)


def test_the_ways_to_refuse_are_all_tried():
    assert set(GIVEN) == set(OptimConfig.READ_BY)
    assert {(option, name) for option, (_, names) in OptimConfig.READ_BY.items() for name in names} == READ


@pytest.mark.parametrize(("values", "words"), [
    ({"schedule": "exponential", "final_lr_ratio": 0}, "final_lr_ratio 0 is never reached by schedule 'exponential'"),
    ({"schedule": "exponential", "decay_start_step": 1}, r"decay_start_step 1 is before .* \(warmup_steps 2\)"),
    ({"schedule": "exponential", "decay_start_step": 8}, r"optim\.decay_start_step 8 is not before the end .*train\.steps 8"),
    ({"schedule": "halving"}, "'halving' needs halve_at_steps"),
    ({"schedule": "halving", "halve_at_steps": [5, 4]}, r"halve_at_steps \[5, 4\] must rise"),
    ({"schedule": "halving", "halve_at_steps": [4, 4]}, r"halve_at_steps \[4, 4\] must rise"),
    ({"schedule": "halving", "halve_at_steps": [1, 4]}, r"no earlier than the warm-up ends \(warmup_steps 2\)"),
    ({"schedule": "halving", "halve_at_steps": [0], "warmup_steps": 0}, "or step 1"),
    ({"schedule": "halving", "halve_at_steps": [4, 8]}, r"optim\.halve_at_steps 8 is not before the end .*train\.steps 8"),
    ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "'inverse_sqrt' with warmup_steps 0"),
    ({"schedule": "exponental"}, "schedule"), ({"name": "adam"}, "name"), ({"update_clipping": 0}, "update_clipping"),
])
def test_what_cannot_be_is_refused_in_one_line(values, words):
    with pytest.raises(UserError, match=words) as caught:
        run_config(**values)
    assert "optim" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adafactor_with_sharded_state_is_refused_with_what_to_do(stage):
    with pytest.raises(UserError, match=rf"optim\.name 'adafactor' with deepspeed\.zero_stage {stage}: .*"
                                        r"use deepspeed\.zero_stage 0, or 'adamw'") as caught:
        run_config(stage, name="adafactor")
    assert "\n" not in str(caught.value)


def test_the_discriminators_optimizer_is_checked_as_well():
    needed = ["--data.path", "d", "--run_dir", "r", "--discriminator_optim.name", "adafactor"]
    with pytest.raises(UserError, match=r"discriminator_optim\.name 'adafactor' with deepspeed\.zero_stage 1"):
        load_config(TokenizerRunConfig, needed, "train.py", "text")
    more = ["--deepspeed.zero_stage", "0", "--discriminator_optim.schedule", "linear"]
    run = load_config(TokenizerRunConfig, [*needed, *more], "train.py", "text")
    assert (run.optim.name, run.discriminator_optim.name) == ("adamw", "adafactor")
    assert (run.optim.schedule, run.discriminator_optim.schedule) == ("cosine", "linear")


@pytest.mark.parametrize("values", [PARTI, DALLE], ids=["parti", "dalle"])
def test_a_published_recipe_is_read_and_written_as_yaml(values, tmp_path: Path):
    argv = [f"--optim.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in values.items()]
    needed = ["--data.path", "d", "--run_dir", "r", "--image_tokenizer", "t", "--deepspeed.zero_stage", "0"]
    run = load_config(Seq2SeqRunConfig, [*needed, "--train.steps", "450000", *argv], "train.py", "text")
    assert run.optim == OptimConfig(**values)
    (tmp_path / "config.yaml").write_text(dump_config(run))
    assert load_config(Seq2SeqRunConfig, ["--config", str(tmp_path / "config.yaml")], "train.py", "text") == run


def test_the_config_of_a_run_from_before_is_still_read():
    """It holds every option of then, also those that its schedule does not read."""
    old = {"lr": 0.001, "betas": [0.9, 0.95], "weight_decay": 0.05, "warmup_steps": 5, "schedule": "constant",
           "final_lr_ratio": 0.05, "gradient_clipping": 1.0}
    run = RunConfig.parse({"run_dir": "r", "optim": old}, "test")
    assert (run.optim.name, run.optim.schedule) == ("adamw", "constant")
    assert type(build_optimizer(small(), OptimConfig())) is torch.optim.AdamW
