"""Keep the last few checkpoints, the best one, and every N-th for good; delete the others."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.files import write_json_atomic
from training.config.run import CheckpointConfig
from training.runs.manifest import read_manifest

MEASURED = "measured"  # key of a manifest: the held-out measurement of this step
BEST = "best.json"

HIGHER_IS_BETTER = {"validation_loss": False, "validation_psnr": True, "validation_top1": True}
"""Every held-out number that metrics.jsonl may have: nats per token, dB, share of captions found.
"""


@dataclass(frozen=True)
class Measured:
    """A number of the held-out split; name: one of HIGHER_IS_BETTER."""

    name: str
    value: float

    def better_than(self, other: Measured | None) -> bool:
        """Whether this beats the best so far; an equal or a not finite value does not."""
        if other is None or not math.isfinite(self.value):
            return math.isfinite(self.value)
        if HIGHER_IS_BETTER[self.name]:
            return self.value > other.value
        return self.value < other.value


def delete_old(run_dir: Path, keep: CheckpointConfig, names: list[str]) -> None:
    """Delete those of the whole checkpoints `names`, oldest first, that nothing keeps.

    With keep_best, RUN/best.json names the best one.
    """
    best = _name_best(run_dir, names) if keep.keep_best else None
    candidates = [name for name in names if not _is_kept_for_good(name, keep)]
    # keep_last counts these alone: those kept for good do not use it up
    for name in candidates[: -keep.keep_last]:
        if name != best:
            shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name: step-00001234 -> 1234."""
    return int(name.removeprefix("step-"))


def _is_kept_for_good(name: str, keep: CheckpointConfig) -> bool:
    return keep.keep_every_steps > 0 and step_of(name) % keep.keep_every_steps == 0


def _name_best(run_dir: Path, names: list[str]) -> str | None:
    """Write best.json -> the name of the best checkpoint; None where none was measured."""
    best: Measured | None = None
    best_name: str | None = None
    # from the manifests, not from memory: whatever a kill interrupts here, the next save finds the
    # same
    for name in names:
        manifest = read_manifest(run_dir / "checkpoints" / name)
        measured = Measured(**manifest[MEASURED]) if MEASURED in manifest else None
        if measured and measured.better_than(best):
            best, best_name = measured, name

    if best is not None and best_name is not None:
        write_json_atomic(run_dir / BEST,
                          {"step": step_of(best_name), "checkpoint": f"checkpoints/{best_name}",
                           best.name: best.value})
    return best_name
