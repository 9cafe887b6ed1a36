"""Checkpoints of another number of processes: turn DeepSpeed's shards into its universal format."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tokenloom_common.errors import ResumeError, without_foreign_advice

# client state under which DeepSpeed's converter accepts a checkpoint
INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
LAUNCHERS_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK",
                   "CROSS_SIZE", "LOCAL_SIZE")


def to_universal(checkpoint: Path, folder: Path) -> None:
    """Convert a DeepSpeed checkpoint (a tag's folder, ZeRO 1 to 3) into `folder`, made anew.

    Runs in a process of its own, because DeepSpeed's converter forks and prints. ResumeError with
    DeepSpeed's reason.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    # the converter is no rank of this run: with the launcher's names it would wait for the others
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_NAMES}
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
               "--input_folder", str(checkpoint), "--output_folder", str(folder),
               "--num_extract_workers", "1", "--num_merge_workers", "1"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = without_foreign_advice(lines[-1]) if lines else "no reason given"
        raise ResumeError(f"{checkpoint}: DeepSpeed cannot turn this checkpoint into one for "
                          f"another number of processes ({reason[:200]}); use as many as before, "
                          "or --checkpoint.resume never")
