"""A training that cannot fit is refused before it starts, with what would fit; one that has room is not."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import torch

from inference.memory import available as memory_module
from tests import tiny
from tokenloom_common.errors import UserError
from training.config.matcher import MatcherRunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.processes import Processes
from training.planning import fits
from training.planning.fits import MemoryFit, MemoryOptions, least_memory, refuse_what_cannot_fit
from training.planning.plan import Plan, plan_of
from training.planning.rank_memory import checkpoint_bytes, rank_memory, sharding_of
from training.train_matcher import MatcherTraining
from training.train_seq2seq import Seq2SeqTraining
from training.train_tokenizer import TokenizerTraining

MIB = 1 << 20
ALONE = Processes(0, 1, 0, torch.device("cpu"))


def seq2seq(processes: int = 1, offload: str = "none", **train: Any) -> Plan:
    """A small model with a batch whose activations are most of its memory."""
    config = Seq2SeqRunConfig.parse({
        "run_dir": "-", "data": {"path": "-"}, "image_tokenizer": "-", "model": {"preset": "debug", "dropout": 0.0},
        "train": {"batch_size": 64, "sample_every": 0, **train}, "deepspeed": {"offload": offload}}, "test")
    model = config.model.build({"text_vocab_size": 300, "text_length": 12, "codebook_size": 512, "grid": (16, 16)})
    return plan_of(config, "float32", model=model)


def needed(plan: Plan, **changes: Any) -> int:
    fit = MemoryFit(plan, 1, False)
    memory = fit.memory(MemoryOptions.of(plan.config)._replace(**changes))
    assert memory is not None
    return memory.total


def limited(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(fits, "available_memory", lambda device: count)


def test_a_plan_with_room_passes_and_unknown_memory_passes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    plan = seq2seq()
    for count in (needed(plan), None):
        limited(monkeypatch, count)
        refuse_what_cannot_fit(plan, ALONE)


@pytest.mark.long
def test_only_what_is_certain_is_refused(monkeypatch):
    """Between the least and the most that it may take, a training starts."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    plan = seq2seq()
    activations = plan.activations(64, False, False)
    least = least_memory(rank_memory(plan, sharding_of(plan, 1, 1, False), activations), activations)
    assert least < 0.6 * needed(plan)
    limited(monkeypatch, least)
    refuse_what_cannot_fit(plan, ALONE)
    limited(monkeypatch, least - 1)
    with pytest.raises(UserError, match="needs more than"):
        refuse_what_cannot_fit(plan, ALONE)


@pytest.mark.long
def test_what_it_says_to_change_does_fit(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    plan = seq2seq()
    room = needed(plan) // 3
    limited(monkeypatch, room)
    with pytest.raises(UserError) as refused:
        refuse_what_cannot_fit(plan, ALONE)
    message = str(refused.value)
    found = re.search(r"it would fit with train\.accumulation (\d+);", message)
    assert found, message
    assert needed(plan, accumulation=int(found[1])) <= room < needed(plan, accumulation=int(found[1]) // 2)
    assert "see `tokenloom estimate --config`" in message and f"{plan.parameters:,} parameters" in message


@pytest.mark.long
def test_processes_of_one_machine_share_its_memory(monkeypatch):
    plan = seq2seq()
    limited(monkeypatch, int(1.5 * needed(plan)))
    monkeypatch.setenv("LOCAL_SIZE", "1")
    refuse_what_cannot_fit(plan, ALONE)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    with pytest.raises(UserError, match=r"for each of 8 processes, and .* are there for all of them"):
        refuse_what_cannot_fit(plan, Processes(0, 1, 0, torch.device("cpu")))


def with_much_state(**train: Any) -> Plan:
    """14 million numbers and few tokens."""
    config = Seq2SeqRunConfig.parse({
        "run_dir": "-", "data": {"path": "-"}, "image_tokenizer": "-", "model": {"preset": "emoji-demo"},
        "train": {"batch_size": 16, "sample_every": 0, **train}}, "test")
    model = config.model.build({"text_vocab_size": 300, "text_length": 12, "codebook_size": 512, "grid": (4, 4)})
    return plan_of(config, "float32", model=model)


@pytest.mark.long
def test_a_larger_stage_is_the_first_remedy():
    """Gradients that add up over micro-batches are whole at stage 1 and shared out at stage 2."""
    fit = MemoryFit(with_much_state(accumulation=2), 8, True)
    totals = {stage: fit.memory(MemoryOptions(stage, 2, False, "none")).total for stage in range(4)}
    assert totals[2] < totals[1] - MIB < totals[0]
    assert fit.remedy(totals[2]) == "it would fit with deepspeed.zero_stage 2"
    assert fit.remedy(10 * MIB).startswith("no ZeRO stage")


@pytest.mark.long
def test_more_processes_are_a_remedy():
    fit = MemoryFit(with_much_state(), 1, False)
    least = min(fit.memory(MemoryOptions(stage, 16, on, "none")).total for on in (False, True) for stage in (1, 2, 3))
    assert re.match(r"it would fit on 2 processes", fit.remedy(int(0.95 * least)))


@pytest.mark.long
def test_a_matchers_batch_is_not_divided():
    """Fewer pictures at a time are fewer captions to tell one from: another training."""
    config = MatcherRunConfig.parse({"run_dir": "-", "data": {"path": "-"}, "train": {"batch_size": 64}}, "test")
    model = config.model.build({"text_vocab_size": 300, "text_length": 12})
    fit = MemoryFit(plan_of(config, "float32", model=model), 1, False)
    for part in (2, 4, 8):
        memory = fit.memory(MemoryOptions.of(config))
        assert "train.accumulation" not in fit.remedy(memory.total // part)


def test_combinations_that_the_config_refuses_are_not_proposed():
    config = TokenizerRunConfig.parse({"run_dir": "-", "data": {"path": "-"}, "model": {"preset": "debug"}}, "test")
    plan = plan_of(config, "float32")
    assert MemoryFit(plan, 1, False).memory(MemoryOptions(3, 1, False, "none")) is None  # a tokenizer is not sharded so far
    adafactor = Seq2SeqRunConfig.parse({
        "run_dir": "-", "data": {"path": "-"}, "image_tokenizer": "-", "optim": {"name": "adafactor"},
        "deepspeed": {"zero_stage": 0}}, "test")
    assert MemoryOptions(2, 1, False, "none").applied_to(plan_of(adafactor, "float32", model=adafactor.model.build(
        {"text_vocab_size": 300, "text_length": 12, "codebook_size": 512, "grid": (4, 4)}))) is None


@pytest.mark.long
@pytest.mark.parametrize("script", ["seq2seq", "tokenizer", "matcher"])
def test_the_trainings_refuse_before_they_write_anything(script, group, tmp_path, monkeypatch):
    limited(monkeypatch, MIB)
    data = tmp_path / "data"
    data.mkdir()
    for number, picture in enumerate(tiny.pictures(4)):
        picture.save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"picture {number}")
    values = {"run_dir": str(tmp_path / "run"), "data": {"path": str(data)}, "train": {"batch_size": 4}}
    with pytest.raises(UserError, match="needs more than"):
        if script == "seq2seq":
            tiny.token_shards(tmp_path, 12)
            run = {**values, "data": {"path": str(tmp_path / "tokens")}, "image_tokenizer": str(tmp_path / "tokenizer")}
            Seq2SeqTraining(Seq2SeqRunConfig.parse(run | {"text": {"vocab_size": 300}}, "test"), group)
        elif script == "tokenizer":
            TokenizerTraining(TokenizerRunConfig.parse({**values, "model": {"preset": "debug"}}, "test"), group)
        else:
            MatcherTraining(MatcherRunConfig.parse({**values, "text": {"vocab_size": 290}}, "test"), group)
    assert not (tmp_path / "run").exists()


def test_what_is_available_is_asked_of_the_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    asked: list[Any] = []
    monkeypatch.setattr(fits, "available_memory", lambda device: asked.append(device) or memory_module.available_memory("cpu"))
    refuse_what_cannot_fit(seq2seq(), ALONE)
    assert asked == [torch.device("cpu")]


def test_a_disk_without_room_for_a_checkpoint_and_the_export_is_refused(monkeypatch):
    plan = seq2seq()
    room = checkpoint_bytes(plan, plan.config.deepspeed.zero_stage) + plan.copy
    for free, refused in ((room, False), (room - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(room, 0, free))
        if not refused:
            refuse_what_cannot_fit(plan, ALONE)
            continue
        with pytest.raises(UserError, match=r"^--run_dir -: not enough room: at least .* are needed"):
            refuse_what_cannot_fit(plan, ALONE)
