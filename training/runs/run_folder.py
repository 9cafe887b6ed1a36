"""A run folder as a whole: hold it against other runs, and put aside what an earlier run left."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from tokenloom_common.errors import UserError
from training.runs.retention import BEST

log = logging.getLogger(__name__)

OUTPUTS = ("config.yaml", "env.json", "metrics.jsonl", "samples", "checkpoints", "latest.json",
           "model", "validation.json", "curves.png", "codebook.png", "text_tokenizer",
           "tokenizer_image", "incidents", "report.html", BEST, "tensorboard", "wandb", "wandb-id")
"""Everything that a run writes into its folder; a fresh start moves these and leaves other files
alone."""

# folders that this process holds, with the open files that hold them
_HELD: dict[Path, IO[str]] = {}


def hold_folder(run_dir: Path) -> None:
    """Hold the folder until this process ends. UserError if another run holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = run_dir.resolve()
    if folder in _HELD:  # flock would refuse a second file of the same process
        return
    file = (folder / ".lock").open("w")
    try:
        # released by the system, however the process ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _HELD[folder] = file
    except BlockingIOError:
        raise UserError(f"{run_dir}: another run is writing there; wait for it, stop it, or give "
                        "another --run_dir") from None


def set_aside(run_dir: Path) -> None:
    """Move the outputs of an earlier run into RUN/before-1, before-2, ..."""
    used = [run_dir / name for name in OUTPUTS if (run_dir / name).exists()]
    if not used:
        return
    number = 1
    while (run_dir / f"before-{number}").exists():
        number += 1
    aside = run_dir / f"before-{number}"
    aside.mkdir()
    # renamed, never deleted, and never copied: checkpoints are large
    for path in used:
        os.rename(path, aside / path.name)
    log.warning("%s: starting over; what was there is now in %s", run_dir, aside)
