"""DeepSpeed on one process is a plain PyTorch loop, at every ZeRO stage, and what it would let through is stopped."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tokenloom_common.errors import RunFailedError, UserError
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import resolve_precision
from training.engine.optim import build_optimizer, lr_at
from training.engine.processes import Processes

STAGES = (0, 1, 2, 3)


class Small(nn.Module):
    """Every kind of tensor: matrices, a gain, biases, an embedding, a buffer, and dropout where it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16, 3, bias=False)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(self.embedding(ids))))
        return self.last(self.dropout(hidden)) * self.scale.to(hidden.dtype)


def small(seed: int = 0, dropout: float = 0.0) -> Small:
    torch.manual_seed(seed)
    return Small(dropout)


def config(stage: int = 0, **train) -> RunConfig:
    """Learning rates and clipping for which warm-up, clipping and decay all show."""
    return RunConfig.parse({
        "run_dir": "unused", "train": {"steps": 8, "batch_size": 8, **train}, "deepspeed": {"zero_stage": stage},
        "optim": {"lr": 0.02, "warmup_steps": 3, "weight_decay": 0.3, "gradient_clipping": 0.5}}, "test")


def batch(step: int, device: torch.device, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 5, (size, 4), generator=generator)
    return ids.to(device), torch.randn(size, 4, 3, generator=generator).to(device)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target).square().mean()


def engine_for(module: nn.Module, run: RunConfig, group: Processes, precision: str = "float32") -> Engine:
    return Engine(module, build_optimizer(module, run.optim), run, group, precision)


def train(engine: Engine, run: RunConfig, group: Processes, steps: range) -> list[float]:
    """The loop of training/loop/loop.py without its log -> the loss of every step, averaged over its micro-batches."""
    losses = []
    for step in steps:
        engine.set_lr(lr_at(step, run.train.steps, run.optim))
        total = 0.0
        ids, target = batch(step, group.device)
        for part in zip(ids.chunk(run.train.accumulation), target.chunk(run.train.accumulation), strict=True):
            loss = squared_error(engine(part[0]), part[1])
            total += float(loss.detach())
            engine.backward(loss, step + 1)
            engine.step(step + 1)
        losses.append(total / run.train.accumulation)
    return losses


def plain_train(module: nn.Module, run: RunConfig, group: Processes, steps: range) -> tuple[list[float], list[float]]:
    """The same in PyTorch alone -> losses, gradient norms before clipping."""
    module = module.to(group.device)
    optimizer = build_optimizer(module, run.optim)
    losses, norms = [], []
    for step in steps:
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr_at(step, run.train.steps, run.optim)
        ids, target = batch(step, group.device)
        loss = squared_error(module(ids), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), run.optim.gradient_clipping)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(found[name], value.detach().cpu(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# ---- the engine is a plain loop ----

@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_on_one_process_equals_a_plain_loop(group, stage):
    run, module = config(stage), small()
    plain = copy.deepcopy(module)
    expected, norms = plain_train(plain, run, group, range(8))
    assert min(norms) > run.optim.gradient_clipping  # clipping is at work in every step
    engine = engine_for(module, run, group)
    assert train(engine, run, group, range(8)) == pytest.approx(expected, abs=1e-6)
    assert_same_state(engine.full_state(), plain.state_dict(), 1e-6)
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_reported_gradient_norm_is_the_one_before_clipping(group, stage):
    run, module = config(stage), small()
    _, norms = plain_train(copy.deepcopy(module), run, group, range(1))
    engine = engine_for(module, run, group)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    norm, skipped = engine.step(1)
    assert norm == pytest.approx(norms[0], rel=1e-5)
    assert skipped == 0


@pytest.mark.parametrize("clipping", [0.0, 1e9])
def test_no_clipping_is_no_clipping(group, clipping):
    """DeepSpeed's own default is 1.0; a 0 must not mean that."""
    base = config()
    run = base.model_copy(update={"optim": base.optim.model_copy(update={"gradient_clipping": clipping}),
                                  "train": base.train.model_copy(update={"steps": 3})})
    module = small()
    with torch.no_grad():
        module.last.weight.mul_(30)
    plain = copy.deepcopy(module).to(group.device)
    ids, target = batch(0, group.device)
    squared_error(plain(ids), target).backward()
    assert float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])) > 2
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)  # Adam would hide the size of a gradient
    sgd.step()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.01), run, group, "float32")
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert_same_state(engine.full_state(), plain.state_dict(), 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_8x1_equals_2x4(group, stage):
    states, losses = [], []
    for accumulation in (8, 2):
        run = config(stage, accumulation=accumulation)
        engine = engine_for(small(), run, group)
        losses.append(train(engine, run, group, range(4)))
        states.append(engine.full_state())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_same_state(states[0], states[1], 1e-6)


def test_weights_change_only_at_the_end_of_an_accumulation_window(group):
    run = config(accumulation=2)
    engine = engine_for(small(), run, group)
    states = [engine.full_state()]
    for part in range(4):
        ids, target = batch(part, group.device, size=4)
        engine.backward(squared_error(engine(ids), target), 1)
        engine.step(1)
        states.append(engine.full_state())
    changed = [not torch.equal(a["first.weight"], b["first.weight"]) for a, b in itertools.pairwise(states)]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_and_stays_finite(group, stage):
    run = config(stage)
    engine = engine_for(small(), run, group, "bfloat16")
    before = engine.full_state()
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    losses = train(engine, run, group, range(3))
    after = engine.full_state()
    assert all(math.isfinite(loss) for loss in losses)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(after[name].dtype == torch.float32 for name, _ in small().named_parameters())
    assert not torch.equal(before["first.weight"], after["first.weight"])
    float32 = engine_for(small(), run, group)
    assert losses == pytest.approx(train(float32, run, group, range(3)), rel=0.15)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_exported_from_bfloat16_is_the_float32_weights_that_were_trained(group, stage):
    run = config(stage)
    engine = engine_for(small(), run, group, "bfloat16")
    train(engine, run, group, range(3))
    weight = engine.full_state()["first.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())  # finer than bfloat16
    torch.testing.assert_close(weight.bfloat16(), _gathered(engine.module.first.weight), rtol=0.01, atol=1e-3)


def _gathered(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().cpu().clone()


# ---- the whole state ----

@pytest.mark.parametrize("stage", STAGES)
def test_full_state_is_the_modules_own_state(group, stage):
    module = small()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    state = engine_for(module, config(stage), group).full_state()
    assert_same_state(state, expected, 0)
    assert list(state) == list(expected)
    state["first.weight"].zero_()  # a copy: nothing in the engine changes with it
    small().load_state_dict(state)


@pytest.mark.parametrize("stage", STAGES)
def test_saved_and_loaded_into_a_fresh_engine_continues_to_the_bit(group, stage, tmp_path):
    run = config(stage)
    engine = engine_for(small(), run, group)
    train(engine, run, group, range(4))
    engine.save(tmp_path)
    assert not (tmp_path / "latest").exists()  # ours is latest.json, written last
    expected = [loss.hex() for loss in train(engine, run, group, range(4, 8))]
    fresh = engine_for(small(seed=1), run, group)
    fresh.load(tmp_path)
    assert [loss.hex() for loss in train(fresh, run, group, range(4, 8))] == expected
    assert_same_state(fresh.full_state(), engine.full_state(), 0)


def test_loading_needs_the_optimizer_state_too(group, tmp_path):
    """What a resume that restores the weights alone would give differs: the test above can fail."""
    run = config()
    engine = engine_for(small(), run, group)
    train(engine, run, group, range(4))
    module = small(seed=1)
    module.load_state_dict(engine.full_state())
    expected = train(engine, run, group, range(4, 8))
    assert train(engine_for(module, run, group), run, group, range(4, 8)) != expected


def test_loading_what_is_not_there_fails(group, tmp_path: Path):
    engine = engine_for(small(), config(), group)
    with pytest.raises(RunFailedError, match=r"deepspeed: not there for every process"):
        engine.load(tmp_path)


# ---- what is not finite ----

@pytest.mark.parametrize(("stage", "precision"), [*((stage, "float32") for stage in STAGES), (0, "bfloat16"), (1, "bfloat16"),
                                                  (2, "bfloat16")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_half", [0, 1])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(group, caplog, stage, precision, value, bad_half):
    run = config(stage, accumulation=2)
    engine = engine_for(small(), run, group, precision)
    train(engine, run, group, range(2))
    before = engine.full_state()
    for half in range(2):
        ids, target = batch(2 + half, group.device, size=4)
        loss = squared_error(engine(ids), target)
        terms = {"l1": loss.detach(), "commit": loss.detach()}
        if half == bad_half:  # an infinite loss whose own gradient is finite is skipped as well
            loss, terms = loss + value, {**terms, "commit": torch.tensor(value)}
        engine.backward(loss, 3, terms)
        engine.step(3)
    assert engine.skipped == 1
    assert "step 3 of the model is skipped: not finite: commit (1 skipped so far" in caplog.text
    assert_same_state(engine.full_state(), before, 0)
    assert all(math.isfinite(loss) for loss in train(engine, run, group, range(3, 5)))  # nothing is left of it
    assert engine.skipped == 1
    with pytest.raises(AssertionError):
        assert_same_state(engine.full_state(), before, 0)


def test_a_loss_without_terms_is_named_loss(group, caplog):
    engine = engine_for(small(), config(), group)
    engine.backward(squared_error(engine(batch(0, group.device)[0]), torch.tensor(math.nan)), 1)
    engine.step(1)
    assert "not finite: loss" in caplog.text


def not_differentiable_here(prediction: Tensor) -> Tensor:
    """0, with a gradient that is not a number."""
    return (prediction - prediction.detach()).abs().sqrt().sum()


@pytest.mark.parametrize(("stage", "precision"), [*((stage, "float32") for stage in STAGES), (0, "bfloat16"), (1, "bfloat16")])
def test_a_gradient_that_is_not_finite_is_a_counted_skipped_step(group, caplog, stage, precision):
    run = config(stage)
    engine = engine_for(small(), run, group, precision)
    train(engine, run, group, range(2))
    before = engine.full_state()
    engine.backward(not_differentiable_here(engine(batch(2, group.device)[0])), 3)
    assert engine.step(3)[1] == 1
    assert "not finite: gradient" in caplog.text
    assert_same_state(engine.full_state(), before, 0)
    assert all(math.isfinite(loss) for loss in train(engine, run, group, range(3, 5)))


# ---- two engines ----

@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_that_is_changed_in_place_is_taken_over(group, stage, precision):
    """K-means and restarts write a learned codebook; without this the optimizer's copy would undo it at the next step."""
    engine = engine_for(small(), config(stage), group, precision)
    weight = engine.module.embedding.weight
    with torch.no_grad():
        weight.fill_(3.0)
    engine.take_over([weight, weight])
    assert engine.full_state()["embedding.weight"].unique().tolist() == [3.0]
    engine.set_lr(0.0)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert weight.float().unique().tolist() == [3.0]


def test_an_engine_that_starts_later_has_its_own_schedule_and_folder(group, tmp_path):
    run, optim = config(), OptimConfig(lr=0.5, warmup_steps=2, schedule="constant", gradient_clipping=0.0)
    module = small()
    engine = Engine(module, build_optimizer(module, optim), run, group, "float32", optim, "discriminator", start_step=3)
    assert [engine.lr_of(step) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert deepspeed_json(run, 1, "float32", 10, optim)["gradient_clipping"] == 0.0
    engine.save(tmp_path)
    engine_for(small(), run, group).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"deepspeed", "deepspeed-discriminator"}


# ---- offload, float16, compiled ----

def with_deepspeed(stage: int, **changes) -> RunConfig:
    run = config(stage).plain()
    return RunConfig.parse({**run, "deepspeed": run["deepspeed"] | changes.pop("deepspeed", {}),
                            "train": run["train"] | changes.pop("train", {})}, "test")


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")])
def test_what_is_kept_in_main_memory_changes_no_number(group, stage, offload):
    plain, run = config(stage), with_deepspeed(stage, deepspeed={"offload": offload})
    expected = train(engine_for(small(), plain, group), plain, group, range(6))
    engine = engine_for(small(), run, group)
    assert engine._engine.zero_offload_optimizer() is not None
    assert (engine._engine.zero_offload_param() is not None) == (offload == "parameters")
    assert train(engine, run, group, range(6)) == pytest.approx(expected, abs=1e-6)


def test_a_compiled_module_computes_the_same_and_keeps_its_names(group):
    plain, run = config(1), with_deepspeed(1, train={"compile": True})
    expected = train(engine_for(small(), plain, group), plain, group, range(3))
    engine = engine_for(small(), run, group)
    assert engine.module._compiled_call_impl is not None
    engine.module._compiled_call_impl = None  # compiling takes a minute and a compiler; that it was asked for is seen above
    assert train(engine, run, group, range(3)) == pytest.approx(expected, abs=1e-5)
    assert set(engine.full_state()) == set(small().state_dict())


needs_float16 = pytest.mark.skipif(not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
                                   reason="this machine has no float16")


@needs_float16
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float16_finds_its_scale_trains_and_counts_no_incident(group, stage):
    run = with_deepspeed(stage)
    engine = engine_for(small(), run, group, "float16")
    applied, losses = [], []
    for step in range(10):
        engine.set_lr(0.02)
        ids, target = batch(step % 2, group.device)
        loss = squared_error(engine(ids), target)
        engine.backward(loss, step + 1)
        engine.step(step + 1)
        applied.append(engine.window_applied)
        losses.append(float(loss.detach()))
    assert applied[-1]
    assert losses[-1] < 0.9 * losses[1]
    assert engine.skipped == 0
    assert math.isfinite(engine.grad_norm)
    assert all(value.isfinite().all() for value in engine.full_state().values())


@needs_float16
def test_a_loss_that_is_not_finite_is_counted_in_float16_too(group):
    run = with_deepspeed(1)
    engine = engine_for(small(), run, group, "float16")
    for step in range(6):
        ids, target = batch(step, group.device)
        loss = squared_error(engine(ids), target)
        engine.backward(loss * (math.nan if step == 4 else 1.0), step + 1)
        engine.step(step + 1)
        assert engine.window_applied or step in (0, 1, 2, 4)
    assert engine.skipped == 1


@pytest.mark.parametrize(("train_options", "stage", "words"), [
    ({"precision": "float16"}, 0, "float16 with deepspeed.zero_stage 0"), ({"compile": True}, 3, "train.compile with")])
def test_combinations_that_do_not_work_are_refused(train_options, stage, words):
    with pytest.raises(UserError, match=words):
        with_deepspeed(stage, train=train_options)


def test_float16_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(UserError, match="no instructions for it; use float32"):
        resolve_precision(with_deepspeed(1, train={"precision": "float16"}), torch.device("cpu"))


# ---- DeepSpeed's JSON ----

def test_deepspeeds_json_follows_from_ours():
    run = config(2, batch_size=48, accumulation=3)
    derived = deepspeed_json(run, world_size=4, precision="bfloat16", parameters=1000)
    assert (derived["train_batch_size"], derived["gradient_accumulation_steps"], derived["train_micro_batch_size_per_gpu"]) == (
        48, 3, 4)
    buckets = [deepspeed_json(run, 4, "float32", size)["zero_optimization"]["reduce_bucket_size"] for size in (1000, 10**10)]
    assert buckets == [1000, 500_000_000]  # never larger than the model
    assert derived["gradient_clipping"] == 0.5  # always there: DeepSpeed's default is 1.0
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["bf16"] == {"enabled": True}
    assert deepspeed_json(run, 4, "float32", 1000)["bf16"] == {"enabled": False}


def test_every_key_of_the_json_is_one_that_deepspeed_reads(group):
    """DeepSpeed accepts a misspelt top-level key in silence."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization", "bf16",
                                                                                      "wall_clock_breakdown"}
    assert set(deepspeed_json(config(), 1, "float32", 1000)) <= known
    assert "gradient_cliping" not in known


@pytest.mark.parametrize(("world", "accumulation", "batch_size"), [(3, 1, 8), (1, 3, 8), (2, 8, 8), (4, 4, 24)])
def test_a_batch_that_cannot_be_divided_is_refused_with_its_numbers(world, accumulation, batch_size):
    run = config(batch_size=batch_size, accumulation=accumulation)
    with pytest.raises(UserError, match=rf"batch_size {batch_size} is not divisible by {world} processes x "
                                        rf"train\.accumulation {accumulation} = {world * accumulation}"):
        deepspeed_json(run, world, "float32", 1000)


@pytest.mark.parametrize(("asked", "device", "used"), [
    ("auto", "cpu", "float32"), ("auto", "cuda", "bfloat16"), ("float32", "cuda", "float32"), ("bfloat16", "cpu", "bfloat16")])
def test_precision_is_what_was_asked_or_follows_from_the_device(asked, device, used):
    assert resolve_precision(config(precision=asked), torch.device(device)) == used


# ---- processes ----

def test_one_process_is_the_first_and_agrees_with_itself(group):
    assert (group.rank, group.world_size, group.is_first) == (0, 1, True)
    assert group.any(True) is True
    assert group.any(False) is False
    assert (group.maximum(3.5), group.mean(-2.0)) == (3.5, -2.0)
    assert group.first_does(lambda: [1, 2]) == group.first_then_others(lambda: [1, 2]) == [1, 2]
    with pytest.raises(UserError, match="reason"):
        group.first_does(lambda: (_ for _ in ()).throw(UserError("reason")))


def test_on_the_cpu_nothing_is_compiled(group):
    import deepspeed

    if group.device.type == "cpu":
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


# ---- the learning rate ----

def test_learning_rates_by_hand():
    cosine = OptimConfig(lr=1.0, warmup_steps=4, final_lr_ratio=0.1)
    assert [lr_at(step, 12, cosine) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_at(8, 12, cosine) == pytest.approx(0.1 + 0.9 * 0.5)  # half of the way down
    assert lr_at(6, 12, cosine) == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.sqrt(0.5)))
    assert lr_at(12, 12, cosine) == pytest.approx(0.1)
    assert lr_at(1000, 12, cosine) == pytest.approx(0.1)
    rates = [lr_at(step, 12, cosine) for step in range(12)]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 0.14


def test_a_constant_schedule_stays_after_its_warm_up():
    constant = OptimConfig(lr=0.5, warmup_steps=2, schedule="constant", final_lr_ratio=0.0)
    assert [lr_at(step, 9, constant) for step in (0, 1, 2, 8, 100)] == [0.25, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_no_warm_up_starts_at_the_peak_and_a_run_shorter_than_its_warm_up_never_divides_by_zero(schedule):
    assert lr_at(0, 10, OptimConfig(lr=2.0, warmup_steps=0, schedule=schedule)) == 2.0
    assert lr_at(0, 1, OptimConfig(lr=2.0, warmup_steps=0, schedule=schedule)) == 2.0
    short = OptimConfig(lr=2.0, warmup_steps=50, schedule=schedule)
    assert [lr_at(step, 3, short) for step in range(3)] == pytest.approx([0.04, 0.08, 0.12])


def test_set_lr_reaches_the_optimizer(group):
    run = config(1)
    engine = engine_for(small(), run, group)
    before = engine.full_state()
    engine.set_lr(0.0)
    ids, target = batch(0, group.device)
    engine.backward(squared_error(engine(ids), target), 1)
    engine.step(1)
    assert_same_state(engine.full_state(), before, 0)


# ---- weight decay ----

@pytest.mark.parametrize("module", [small, lambda: tiny.seq2seq(learned_positions=True), tiny.vqgan],
                         ids=["small", "seq2seq", "vqgan"])
def test_decay_is_on_matrices_alone_and_every_parameter_is_trained_once(module):
    model = module()
    frozen = next(p for p in model.parameters() if p.ndim == 4 or p.ndim == 2)
    frozen.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    listed = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert names[id(frozen)] not in listed
    matrices = {f"{name}.weight" for name, m in model.named_modules()
                if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.requires_grad}
    assert {name for name, decay in decays.items() if decay == 0.3} == matrices
    assert {name for name, decay in decays.items() if decay == 0.0} == set(listed) - matrices
    assert any(name.endswith("bias") for name in decays)


def test_the_optimizer_gets_its_numbers():
    optimizer = build_optimizer(small(), OptimConfig(lr=0.7, betas=(0.5, 0.6), weight_decay=0.0))
    assert optimizer.defaults["lr"] == 0.7
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
