"""A run's folder: config, environment, checkpoints that appear whole, and where to continue.

    run_dir/config.yaml  env.json  metrics.jsonl  samples/  checkpoints/step-00001234/MANIFEST.json
            latest.json  model/
"""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenloom_common.config import by_dotted_name
from tokenloom_common.errors import ResumeError, RunFailedError
from tokenloom_common.files import (
    publish_folder,
    sync_path,
    write_json_atomic,
    write_text_atomic,
)
from training.config.loading import dump_config
from training.config.run import RunConfig
from training.config.start_folders import MANIFEST
from training.engine.agreement import check_same
from training.engine.processes import Processes
from training.places import check_export_folder
from training.runs.environment import environment
from training.runs.manifest import (
    RANKS,
    SCHEMA_VERSION,
    checkpoint_problem,
    file_entries,
    read_manifest,
)
from training.runs.random_state import restore_rng, rng_state, seed_everything
from training.runs.retention import MEASURED, Measured, delete_old, step_of
from training.runs.run_folder import hold_folder, set_aside

log = logging.getLogger(__name__)

FULL_BYTES = 1 << 20  # free space below which a failed write is one for lack of space
TASK = "task."  # prefix of the task's own tensors in a rank's file


class Savable(Protocol):
    """Writes its own part of a checkpoint, on every process: an engine, or all of a task."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path, resharded: bool = False) -> None: ...


class RunState:
    """Owner of a run folder: writes checkpoints, finds the one to continue from, keeps a few."""

    def __init__(self, config: RunConfig, group: Processes,
                 facts: dict[str, Any] | None = None) -> None:
        """facts: JSON values that a run shares with the one it continues (model, rows of data)."""
        self.config = config
        # tuples become lists, as a manifest has them
        self.facts = json.loads(json.dumps(facts or {}))
        self.group = group
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.resume_from: Path | None = None
        self.resharded = False
        """Whether the checkpoint that was loaded is of another number of processes."""

    def prepare(self) -> None:
        """Decide where to continue, then create the folder with config.yaml and env.json.

        A refused resume changes nothing. A fresh start in a used folder puts its files into
        RUN/before-1, before-2, ...
        """
        check_same(self.group, self.facts, "what is trained")
        self.group.first_does(lambda: hold_folder(self.run_dir))
        self.resume_from = self.find()
        self.group.first_does(self._create_folder)

    def _create_folder(self) -> None:
        if self.resume_from is None:
            set_aside(self.run_dir)
        elif step_of(self.resume_from.name) < self.config.train.steps:
            check_export_folder(self.run_dir / "model")  # now, not at the end of the run
        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        # of a save that was killed
        for leftover in [*self.checkpoints.glob(".*.tmp"), *self.checkpoints.glob(".*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)
        write_text_atomic(self.run_dir / "config.yaml", dump_config(self.config))
        write_json_atomic(self.run_dir / "env.json", environment())

    # ---- save

    def save(self, engines: Savable, step: int, task_state: dict[str, Tensor],
             measured: Measured | None = None) -> None:
        """Save `step` finished steps, so that a checkpoint appears whole or not at all.

        Written aside, hashed into a manifest, flushed, renamed, then named by latest.json.
        task_state: this process's tensors beyond the engines'; measured: the held-out measurement
        of this step. Called on every process, at the end of an accumulation window only.
        """
        try:
            self._save(engines, step, task_state, measured)
        except Exception as error:
            # safetensors and torch.save have exceptions of their own for a full disk
            is_full = (getattr(error, "errno", None) == errno.ENOSPC
                       or shutil.disk_usage(self.run_dir).free <= FULL_BYTES)
            if not is_full:
                raise
            # the unfinished checkpoint fills what little is left
            shutil.rmtree(self.checkpoints / f".step-{step:08d}.tmp", ignore_errors=True)
            kept = self._whole_names()
            earlier = f"{kept[-1]} is whole" if kept else "there is no earlier one"
            raise RunFailedError(f"{self.run_dir}: no space left on the device, so that the "
                                 f"checkpoint of step {step} was not written; {earlier}; free "
                                 "some space, and start the same command again") from None

    def _save(self, engines: Savable, step: int, task_state: dict[str, Tensor],
              measured: Measured | None) -> None:
        name = f"step-{step:08d}"
        aside = self.checkpoints / f".{name}.tmp"

        def clear() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / RANKS).mkdir(parents=True)

        self.group.first_does(clear)
        engines.save(aside)
        tensors = rng_state(self.group.device)
        # contiguous: safetensors refuses views
        tensors |= {f"{TASK}{key}": tensor.contiguous() for key, tensor in task_state.items()}
        save_file(tensors, _rank_file(aside, self.group.rank))
        self.group.barrier()  # the manifest needs the files of all processes
        self.group.first_does(lambda: self._publish(aside, name, step, measured))

    def _publish(self, aside: Path, name: str, step: int, measured: Measured | None) -> None:
        manifest = {"schema_version": SCHEMA_VERSION, "step": step,
                    "world_size": self.group.world_size, **self._settings(), "facts": self.facts,
                    "files": file_entries(aside)}
        if measured and math.isfinite(measured.value):
            manifest[MEASURED] = asdict(measured)
        write_json_atomic(aside / MANIFEST, manifest)
        publish_folder(aside, self.checkpoints / name)
        sync_path(self.checkpoints)  # a renamed folder survives a power cut only after that
        write_json_atomic(self.run_dir / "latest.json",
                          {"step": step, "checkpoint": f"checkpoints/{name}"})

        # a later one was damaged and passed over: it must not push out the one just saved
        earlier = [other for other in self._whole_names() if other <= name]
        delete_old(self.run_dir, self.config.checkpoint, earlier)

    def _settings(self) -> dict[str, Any]:
        """Keys of the config that a checkpoint must share with the run that continues it."""
        train = self.config.train
        # batch and seed decide which data a step number means; each ZeRO stage has its own files
        return {"zero_stage": self.config.deepspeed.zero_stage, "batch_size": train.batch_size,
                "accumulation": train.accumulation, "seed": self.config.seed}

    def _whole_names(self) -> list[str]:
        """Names of the checkpoints that were published, oldest first."""
        return sorted(path.parent.name for path in self.checkpoints.glob(f"step-*/{MANIFEST}"))

    # ---- find

    def find(self) -> Path | None:
        """Return the newest whole checkpoint, or None for a fresh start; log damaged ones.

        ResumeError when checkpoint.resume is 'required' and there is none, or when every one there
        is damaged.
        """
        return self.group.first_does(self._find)

    def _find(self) -> Path | None:
        if self.config.checkpoint.resume == "never":
            return None
        names = sorted((path.name for path in self.checkpoints.glob("step-*")), reverse=True)
        for name in names:
            folder = self.checkpoints / name
            problem = checkpoint_problem(folder)
            if problem is None:
                self._check_same_run(folder)
                return folder
            log.warning("checkpoint %s is not usable: %s; trying the one before", folder, problem)

        # never start over by itself: that would put the only copies of long work aside
        if names:
            raise ResumeError(f"{self.checkpoints}: none of {len(names)} checkpoints is whole; "
                              "repair one, or start over with --checkpoint.resume never")
        if self.config.checkpoint.resume == "required":
            raise ResumeError(f"{self.checkpoints}: no checkpoint to resume from "
                              "(checkpoint.resume is 'required')")
        return None

    def _check_same_run(self, folder: Path) -> None:
        """Raise ResumeError, naming up to three differences, for another kind of run."""
        manifest = read_manifest(folder)
        then = manifest | by_dotted_name(manifest.get("facts", {}))
        now = self._settings() | by_dotted_name(self.facts)
        # a fact that is gone means another order of the data, or AdamW, whose name is no fact;
        # others (a discriminator, a moving average) may be given up
        gone = {name: None for name in then if name not in now
                and (name.startswith("data.") or name == "optim.name")}
        differing = [f"{name} {then.get(name)} then, {value} now"
                     for name, value in (now | gone).items() if then.get(name) != value]
        if differing:
            raise ResumeError(f"{folder} was written by another kind of run "
                              f"({'; '.join(differing[:3])}): use the same settings, another "
                              "--run_dir, or --checkpoint.resume never")

    # ---- load

    def load(self, engines: Savable, folder: Path) -> tuple[int, dict[str, Tensor]]:
        """Restore engines and random state -> the finished steps and the task's tensors."""
        manifest = read_manifest(folder)
        step, processes_then = int(manifest["step"]), int(manifest["world_size"])
        self.resharded = processes_then != self.group.world_size
        if self.resharded:
            log.info("%s was written by %d processes, and %d go on: shards are cut anew; the "
                     "order of the data stays as it was", folder, processes_then,
                     self.group.world_size)
        engines.load(folder, self.resharded)

        was_there = self.group.rank < processes_then
        tensors = load_file(_rank_file(folder, self.group.rank if was_there else 0))
        if was_there:
            restore_rng(tensors, self.group.device)
        else:
            # a new process draws its own numbers
            seed_everything(self.config.seed + step, self.group.rank)
        task_state = {name.removeprefix(TASK): tensor for name, tensor in tensors.items()
                      if name.startswith(TASK)}
        return step, task_state


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / RANKS / f"rank{rank}.safetensors"
