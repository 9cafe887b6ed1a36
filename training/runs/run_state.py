"""A run's folder: config, environment, checkpoints that appear whole, and where to continue.

    run_dir/config.yaml  env.json  metrics.jsonl  samples/  checkpoints/step-00001234/MANIFEST.json  latest.json  model/
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenloom_common.config import by_dotted_name
from tokenloom_common.errors import ResumeError, RunFailedError, UserError
from tokenloom_common.files import (
    file_hash,
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
from training.runs.random_state import _restore_rng, _rng_state, seed_everything
from training.runs.retention import BEST, MEASURED, Measured, delete_old

log = logging.getLogger(__name__)

SCHEMA_VERSION = OLDEST_SCHEMA = 1
OUTPUTS = ("config.yaml", "env.json", "metrics.jsonl", "samples", "checkpoints", "latest.json", "model", "validation.json",
           "curves.png", "codebook.png", "text_tokenizer", "tokenizer_image", "incidents", "report.html", BEST, "tensorboard",
           "wandb", "wandb-id")
FULL_BYTES = 1 << 20  # free space below which a failed write is one for lack of space
RANKS = "ranks"  # folder with one file a process: random state and what the task keeps
TASK = "task."
PACKAGES = ("torch", "deepspeed", "x-transformers", "vector-quantize-pytorch", "sentencepiece", "datasets", "numpy",
            "safetensors", "pillow")


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"python": platform.python_version(), "platform": platform.platform(), "cpus": len(os.sched_getaffinity(0)),
            "gpu": gpu, "packages": versions, "argv": sys.argv}


_HELD: dict[Path, IO[str]] = {}  # run folders that this process holds, with the open files that hold them


class Saved(Protocol):
    """What writes its own part of a checkpoint below a folder, on every process: one engine, or all of a task."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path, resharded: bool = False) -> None: ...


class RunState:
    """Owner of a run folder: writes checkpoints, finds the one to continue from, keeps the last few."""

    def __init__(self, config: RunConfig, group: Processes, facts: dict[str, Any] | None = None) -> None:
        """facts: JSON-able values that a checkpoint must share with the run that continues it (model, rows of data)."""
        self.config = config
        self.facts = json.loads(json.dumps(facts or {}))
        self.group = group
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.resume_from: Path | None = None
        self.resharded = False
        """Whether the checkpoint that was loaded is of another number of processes."""

    def prepare(self) -> None:
        """Decide where to continue, then create the folder and write config.yaml and env.json (first process).

        A refused resume changes nothing. A fresh start in a used folder puts what is there into RUN/before-1, before-2, ...
        """
        check_same(self.group, self.facts, "what is trained")
        self.group.first_does(self._lock)
        self.resume_from = self.find()

        def write() -> None:
            if self.resume_from is None:
                self._set_aside()
            (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in [*self.checkpoints.glob(".*.tmp"), *self.checkpoints.glob(".*.old")]:  # killed while saving
                shutil.rmtree(leftover, ignore_errors=True)
            write_text_atomic(self.run_dir / "config.yaml", dump_config(self.config))
            write_json_atomic(self.run_dir / "env.json", environment())
        self.group.first_does(write)

    def _lock(self) -> None:
        """Hold the folder until this process ends. UserError if another run holds it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        folder = self.run_dir.resolve()
        if folder in _HELD:
            return
        file = (folder / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _HELD[folder] = file
        except BlockingIOError:
            raise UserError(f"{self.run_dir}: another run is writing there; wait for it, stop it, or give another --run_dir"
                            ) from None

    def _set_aside(self) -> None:
        used = [self.run_dir / name for name in OUTPUTS if (self.run_dir / name).exists()]
        if not used:
            return
        number = 1
        while (self.run_dir / f"before-{number}").exists():
            number += 1
        aside = self.run_dir / f"before-{number}"
        aside.mkdir()
        for path in used:
            os.rename(path, aside / path.name)
        log.warning("%s: starting over; what was there is now in %s", self.run_dir, aside)

    def save(self, engines: Saved, step: int, task_state: dict[str, Tensor], measured: Measured | None = None) -> None:
        """Save `step` finished steps: aside, hashed into a manifest, flushed, renamed, then named by latest.json.

        task_state: this process's tensors beyond the engines'; measured: what the held-out split says of this step. Called on
        every process, at the end of an accumulation window only.
        """
        try:
            self._save(engines, step, task_state, measured)
        except Exception as error:  # safetensors and torch.save have exceptions of their own for a full disk
            if getattr(error, "errno", None) != errno.ENOSPC and shutil.disk_usage(self.run_dir).free > FULL_BYTES:
                raise
            shutil.rmtree(self.checkpoints / f".step-{step:08d}.tmp", ignore_errors=True)  # it fills what little is left
            kept = self._whole_names()
            earlier = f"{kept[-1]} is whole" if kept else "there is no earlier one"
            raise RunFailedError(f"{self.run_dir}: no space left on the device, so that the checkpoint of step {step} was not "
                                 f"written; {earlier}; free some space, and start the same command again") from None

    def _save(self, engines: Saved, step: int, task_state: dict[str, Tensor], measured: Measured | None) -> None:
        name = f"step-{step:08d}"
        aside = self.checkpoints / f".{name}.tmp"

        def clear() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / RANKS).mkdir(parents=True)

        self.group.first_does(clear)
        engines.save(aside)
        tensors = _rng_state(self.group.device) | {f"{TASK}{k}": v.contiguous() for k, v in task_state.items()}
        save_file(tensors, self._rank_file(aside, self.group.rank))
        self.group.barrier()
        self.group.first_does(lambda: self._publish(aside, name, step, measured))

    def _rank_file(self, folder: Path, rank: int) -> Path:
        return folder / RANKS / f"rank{rank}.safetensors"

    def _publish(self, aside: Path, name: str, step: int, measured: Measured | None) -> None:
        files = [{"name": str(p.relative_to(aside)), "size": p.stat().st_size, "blake2b": file_hash(p)}
                 for p in sorted(aside.rglob("*")) if p.is_file()]
        write_json_atomic(aside / MANIFEST, {
            "schema_version": SCHEMA_VERSION, "step": step, "world_size": self.group.world_size,
            "zero_stage": self.config.deepspeed.zero_stage, "batch_size": self.config.train.batch_size,
            "accumulation": self.config.train.accumulation, "seed": self.config.seed, "facts": self.facts, "files": files,
            **({MEASURED: asdict(measured)} if measured and math.isfinite(measured.value) else {})})
        publish_folder(aside, self.checkpoints / name)
        sync_path(self.checkpoints)
        write_json_atomic(self.run_dir / "latest.json", {"step": step, "checkpoint": f"checkpoints/{name}"})
        # a later one is a damaged one that was passed over: it must not push out what was just saved
        delete_old(self.run_dir, self.config.checkpoint, [earlier for earlier in self._whole_names() if earlier <= name])

    def _whole_names(self) -> list[str]:
        return sorted(p.parent.name for p in self.checkpoints.glob(f"step-*/{MANIFEST}"))

    def find(self) -> Path | None:
        """The newest whole checkpoint, or None for a fresh start; a damaged one is named and passed over.

        ResumeError when checkpoint.resume is 'required' and there is none, or when every one there is damaged.
        """
        return self.group.first_does(self._find)

    def _find(self) -> Path | None:
        if self.config.checkpoint.resume == "never":
            return None
        names = sorted((p.name for p in self.checkpoints.glob("step-*")), reverse=True)
        for name in names:
            problem = self._problem(self.checkpoints / name)
            if problem is None:
                return self.checkpoints / name
            log.warning("checkpoint %s is not usable: %s; trying the one before", self.checkpoints / name, problem)
        if names:
            raise ResumeError(f"{self.checkpoints}: none of {len(names)} checkpoints is whole; repair one, or start over "
                              "with --checkpoint.resume never")
        if self.config.checkpoint.resume == "required":
            raise ResumeError(f"{self.checkpoints}: no checkpoint to resume from (checkpoint.resume is 'required')")
        return None

    def _problem(self, folder: Path) -> str | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            schema = manifest["schema_version"]
            if not OLDEST_SCHEMA <= schema <= SCHEMA_VERSION:
                age = "newer" if schema > SCHEMA_VERSION else "older"
                return f"its schema {schema} is {age} than this release reads ({SCHEMA_VERSION})"
            ranks = sum(entry["name"].startswith(f"{RANKS}/") for entry in manifest["files"])
            if ranks != manifest["world_size"]:
                return f"it is of {manifest['world_size']} processes and holds the state of {ranks}"
            for entry in manifest["files"]:
                problem = _file_problem(folder / entry["name"], entry)
                if problem is not None:
                    return f"{entry['name']} {problem}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{MANIFEST} cannot be read ({type(error).__name__})"
        self._check_same_run(folder, manifest)
        return None

    def _check_same_run(self, folder: Path, manifest: dict[str, Any]) -> None:
        now = {"zero_stage": self.config.deepspeed.zero_stage,
               "batch_size": self.config.train.batch_size, "accumulation": self.config.train.accumulation,
               "seed": self.config.seed}
        then = {**manifest, **by_dotted_name(manifest.get("facts", {}))}
        now = {**now, **by_dotted_name(self.facts)}
        gone = {name: None for name in then if name.startswith("data.") and name not in now}  # another order of the data
        differing = [f"{k} {then.get(k)} then, {v} now" for k, v in {**now, **gone}.items() if then.get(k) != v][:3]
        if differing:
            raise ResumeError(f"{folder} was written by another kind of run ({'; '.join(differing)}): use the same settings, "
                              "another --run_dir, or --checkpoint.resume never")

    def load(self, engines: Saved, folder: Path) -> tuple[int, dict[str, Tensor]]:
        """Restore engines and random state on every process -> the number of finished steps and the task's tensors."""
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, then = int(manifest["step"]), int(manifest["world_size"])
        self.resharded = then != self.group.world_size
        if self.resharded:
            log.info("%s was written by %d processes, and %d go on: shards are cut anew; the order of the data stays as it was",
                     folder, then, self.group.world_size)
        engines.load(folder, self.resharded)
        known = self.group.rank < then
        tensors = load_file(self._rank_file(folder, self.group.rank if known else 0))
        if known:
            _restore_rng(tensors, self.group.device)
        else:
            seed_everything(self.config.seed + step, self.group.rank)  # a process that was not there draws its own numbers
        return step, {k.removeprefix(TASK): v for k, v in tensors.items() if k.startswith(TASK)}


def _file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        whole = path.stat().st_size == entry["size"] and file_hash(path) == entry["blake2b"]
    except OSError as error:
        return f"cannot be read ({str(error.strerror).lower()})"
    return None if whole else "is damaged"


