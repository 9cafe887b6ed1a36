"""Run folders with checkpoints, written without DeepSpeed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import torch

from training.config.run import RunConfig
from training.engine.processes import Processes
from training.runs.run_state import RunState

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class FirstOfTwo(Processes):
    """The first of two processes, of which the other has the same to say."""

    def first_does(self, action):
        return action()

    def gather(self, value):
        return [value, value]


TWO = FirstOfTwo(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))


class FakeEngine:
    """Keeps one number; writes it as DeepSpeed's part of a checkpoint."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "states.pt").write_bytes(f"{self.value:>200}".encode())

    def load(self, folder: Path, resharded: bool = False) -> None:
        self.resharded = resharded
        self.value = int((folder / "deepspeed" / "states.pt").read_text())


def config(run: Path, **changes) -> RunConfig:
    return RunConfig.parse({"run_dir": str(run), "checkpoint": {"keep_last": 3}, **changes}, "test")


def state(run: Path, group: Processes = ALONE, **changes) -> RunState:
    return RunState(config(run, **changes), group)


def task_state(step: int) -> dict[str, torch.Tensor]:
    return {"seen": torch.tensor(step), "usage": torch.full((3, 2), step / 7).T}


def saved(run: Path, *steps: int) -> RunState:
    """A prepared run with checkpoints at some steps."""
    it = state(run)
    it.prepare()
    for step in steps:
        it.save(FakeEngine(step), step, task_state(step))
    return it


def names(run: Path) -> list[str]:
    """What lies in checkpoints/ and is seen as one."""
    return sorted(p.name for p in (run / "checkpoints").glob("step-*"))


def latest(run: Path) -> dict:
    return json.loads((run / "latest.json").read_text())


def step_of(path: Path | None) -> int | None:
    return None if path is None else int(path.name.removeprefix("step-"))


class RandomStateKept:
    """Leave the random numbers of other tests as they are."""

    def __enter__(self) -> None:
        self.before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        random.setstate(self.before[0])
        numpy.random.set_state(self.before[1])
        torch.set_rng_state(self.before[2])
