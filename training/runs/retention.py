"""Which checkpoints stay: the last few, the one that measured best, and one now and then for good."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.files import write_json_atomic
from training.config.run import CheckpointConfig
from training.config.start_folders import MANIFEST

MEASURED = "measured"  # in a manifest: what the held-out split says of this step
BEST = "best.json"


def delete_old(run_dir: Path, keep: CheckpointConfig, names: list[str]) -> None:
    """Of the whole checkpoints `names`, oldest first, delete what nothing keeps; RUN/best.json names the best one."""
    folder = run_dir / "checkpoints"
    best = _name_best(run_dir, names) if keep.keep_best else None
    passing = [name for name in names if not (keep.keep_every_steps and step_of(name) % keep.keep_every_steps == 0)]
    for name in passing[: -keep.keep_last]:
        if name != best:
            shutil.rmtree(folder / name, ignore_errors=True)


def step_of(name: str) -> int:
    """step-00001234 -> 1234."""
    return int(name.removeprefix("step-"))


def _name_best(run_dir: Path, names: list[str]) -> str | None:
    """The manifests know what was measured: whatever a kill interrupts here, the next save finds the same."""
    best: Measured | None = None
    best_name: str | None = None
    for name in names:
        manifest = json.loads((run_dir / "checkpoints" / name / MANIFEST).read_text(encoding="utf-8"))
        found = Measured(**manifest[MEASURED]) if MEASURED in manifest else None
        if found and found.better_than(best):
            best, best_name = found, name
    if best is not None and best_name is not None:
        write_json_atomic(run_dir / BEST, {"step": step_of(best_name), "checkpoint": f"checkpoints/{best_name}",
                                           best.name: best.value})
    return best_name


HIGHER_IS_BETTER = {"validation_loss": False, "validation_psnr": True, "validation_top1": True}
"""Every number of a held-out split that metrics.jsonl may have: nats a token, dB, share of captions found."""


@dataclass(frozen=True)
class Measured:
    """A number of the held-out split; name: one of HIGHER_IS_BETTER."""

    name: str
    value: float

    def better_than(self, other: Measured | None) -> bool:
        """Whether this is the best so far, of a run that had `other`; what is not finite never is, an equal one is not."""
        if other is None or not math.isfinite(self.value):
            return math.isfinite(self.value)
        return self.value > other.value if HIGHER_IS_BETTER[self.name] else self.value < other.value
