"""Memory of a training process by ZeRO stage: predicted bytes against arithmetic by hand and against what real runs hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from inference.memory.meta_device import Alive
from tests import tiny
from training.config.optim import OptimConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.planning.activations import Activations
from training.planning.engine_memory import Sharding, engine_memory
from training.planning.plan import plan_of
from training.planning.rank_memory import checkpoint_bytes, rank_memory, sharding_of
from training.planning.trained_module import TrainedModule, optimizer_bytes
from training.train_seq2seq import Seq2SeqTraining

NOTHING = Activations(((0, 0),))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, 12)
    return folder


def config(made: Path, run_dir: Path, stage: int, **train: Any) -> Seq2SeqRunConfig:
    """300,000 numbers."""
    return Seq2SeqRunConfig.parse({
        "data": {"path": str(made / "tokens")}, "image_tokenizer": str(made / "tokenizer"), "run_dir": str(run_dir),
        "model": {"preset": "debug", "width": 96, "heads": 3}, "use_layout": False, "text": {"vocab_size": 300,
        "text_length": 12}, "train": {"steps": 2, "batch_size": 4, "precision": "float32", "sample_every": 0, **train},
        "deepspeed": {"zero_stage": stage}, "checkpoint": {"every_steps": 0}}, "test")


def run_and_watch(run: Seq2SeqRunConfig, group: Processes) -> tuple[Seq2SeqTraining, int]:
    """A whole run, export included -> itself, and the most bytes of tensors that were alive."""
    with Alive(nn.Linear(1, 1)) as alive:
        training = Seq2SeqTraining(run, group)
        run_training(training.task(), run, group, training.run_state)
        training.finish()
    return training, alive.peak


@pytest.mark.parametrize(("stage", "changes"), [
    (0, {}), (1, {}), (2, {"accumulation": 2}), (3, {}), (1, {"precision": "bfloat16"}), (0, {"weight_ema": 0.9})])
def test_predicted_bytes_are_those_alive_in_a_run(made, tmp_path, group, stage, changes):
    run = config(made, tmp_path / "run", stage, **changes)
    training, found = run_and_watch(run, group)
    precision = run.train.precision
    plan = plan_of(run, precision, model=training.model.config, tokenizer=training.image_tokenizer.config)
    activations = plan.activations(4 // run.train.accumulation, False, False)
    memory = rank_memory(plan, sharding_of(plan, stage, 1, False), activations)
    assert memory.total - memory.process == pytest.approx(found, rel=0.05)
    files = (tmp_path / "run/checkpoints/step-00000002/deepspeed").rglob("*.pt")
    averages = [path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("rank*.safetensors")]
    # beside the tensors there are names and sizes, which a small model has as many of as a large one
    written = sum(path.stat().st_size for path in files) + (sum(averages) if run.train.weight_ema else 0)
    assert checkpoint_bytes(plan, stage) == pytest.approx(written, rel=0.05)


def module(*groups: tuple[tuple[int, ...], ...], precision: str = "float32", **optim: Any) -> TrainedModule:
    return TrainedModule("model", groups, 0, OptimConfig(**optim), precision)


WEIGHTS = (((100, 50), (50,)), ((400,),))  # 5,450 numbers, 5,050 of them in the larger group


@pytest.mark.parametrize(("together", "temporary"), [(False, 2 * 4 * 5000), (True, 4 * 5450)])
def test_adamw_keeps_two_moments_and_takes_roots_beside(together, temporary):
    """One after another: the root of a moment, and that over its correction; together: the roots of a whole group."""
    state, beside = optimizer_bytes(WEIGHTS, OptimConfig(), together)
    assert state == 2 * 4 * 5450
    assert beside == (temporary if not together else 4 * 5050)


def test_adafactor_keeps_rows_and_columns():
    state, _ = optimizer_bytes((((256, 200),),), OptimConfig(name="adafactor", betas=(0.0, 0.96)), False)
    assert state == 4 * (256 + 200)


def test_stage_0_by_hand():
    found = engine_memory(module(*WEIGHTS), Sharding(0, 4, 1), NOTHING)
    assert (found.parameters, found.optimizer, found.offloaded) == (4 * 5450, 8 * 5450, 0)
    low = engine_memory(module(*WEIGHTS, precision="bfloat16"), Sharding(0, 4, 1), NOTHING)
    assert (low.parameters, low.optimizer) == (2 * 5450, 12 * 5450)  # float32 copies and moments
    phases = {phase.name: phase for phase in low.phases}
    assert phases["reducing gradients"].total == 2 * 2 * 5450
    assert phases["optimizer step"].total == 2 * 5450 + 4 * 5450 + 2 * 4 * 5000


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_stays_is_shared_out(stage):
    alone, four = (engine_memory(module(((1024, 512),), precision="bfloat16"), Sharding(stage, count, 1), NOTHING)
                   for count in (1, 4))
    assert alone.optimizer == 4 * four.optimizer == 12 * 1024 * 512
    assert alone.parameters == (4 if stage == 3 else 1) * four.parameters == 2 * 1024 * 512


def test_gradients_that_add_up_are_whole_below_stage_2():
    def backward(stage: int, accumulation: int) -> int:
        found = engine_memory(module(((1024, 512),)), Sharding(stage, 8, accumulation), NOTHING)
        return next(phase.gradients for phase in found.phases if phase.name == "forward and backward")

    assert [backward(stage, 1) for stage in (0, 1, 2)] == [0, 0, 0]
    assert [backward(stage, 2) for stage in (0, 1, 2)] == [4 * 1024 * 512, 4 * 1024 * 512, 4 * 1024 * 512 // 8]


def test_offloaded_state_is_in_main_memory():
    here, there = (engine_memory(module(((1024, 512),), precision="bfloat16"), Sharding(2, 4, 1, offload, cuda=True), NOTHING)
                   for offload in ("none", "optimizer"))
    assert here.offloaded == 0 and here.optimizer == 12 * 1024 * 128
    assert there.optimizer == 0 and there.offloaded == 12 * 1024 * 128 + 4 * 1024 * 128 + 2 * 1024 * 128
    parameters = engine_memory(module(((1024, 512),), precision="bfloat16"), Sharding(3, 4, 1, "parameters", cuda=True),
                               NOTHING)
    assert parameters.parameters == 0


def test_a_users_buckets_count():
    def reducing(**zero: int) -> int:
        found = engine_memory(module(((1024, 512),)), Sharding(2, 2, 1, zero=zero), NOTHING)
        return next(phase.total for phase in found.phases if phase.name == "reducing gradients")

    assert reducing() > reducing(reduce_bucket_size=1024) + 4 * 1024 * 512 / 2


def test_stage_3_has_live_parameters_up_to_a_limit():
    def forward(**zero: int) -> int:
        found = engine_memory(module(((1024, 512),)), Sharding(3, 2, 1, zero=zero), NOTHING)
        return next(phase.buffers for phase in found.phases if phase.name == "forward and backward")

    assert forward() == 4 * 1024 * 512
    assert forward(stage3_max_live_parameters=1000) == 4 * 1000
