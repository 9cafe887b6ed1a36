"""Adafactor against NumPy and by hand, and through DeepSpeed."""

# Axes: R rows and M columns of a weight, B batch

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tokenloom_common.errors import UserError
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.optim import OPTIMIZERS, Adafactor, build_optimizer, lr_at
from training.engine.processes import Processes


def run_config(stage: int = 0, **optim) -> RunConfig:
    """Numbers for which warm-up, clipping and decay all show within a few steps."""
    values = {"lr": 0.02, "warmup_steps": 2, "weight_decay": 0.3, "gradient_clipping": 0.5, **optim}
    return RunConfig.parse({"run_dir": "unused", "train": {"steps": 8, "batch_size": 8}, "deepspeed": {"zero_stage": stage},
                            "optim": values}, "test")


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
