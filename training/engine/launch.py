"""Join the process group and resolve the precision."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tokenloom_common.errors import UserError
from training.config.run import RunConfig
from training.engine.processes import Processes, meeting, processes_here
from training.engine.stopping import STARTED_ALONE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precision -> the dtype in which a module computes."""

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: the first one reads the headers of all tar shards alone.

Steps have the watchdog.
"""


@contextmanager
def processes(threads: int = 0, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Join the launcher's processes, or be the only one without a launcher; leave them at the end.

    Sets the global state of this program: threads, TF32, the process group.
    patience: how long one process waits for the others.
    """
    deepspeed = import_deepspeed()
    if "RANK" not in os.environ:
        _start_alone()

    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        backend = "nccl"
        torch.cuda.set_device(device)  # before NCCL starts, which takes the current one
        torch.set_float32_matmul_precision("high")  # TF32
    else:
        device = torch.device("cpu")
        backend = "gloo"
    cores = len(os.sched_getaffinity(0))  # those that this process may use, not the machine's
    torch.set_num_threads(threads or max(1, cores // processes_here()))

    with meeting():
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=patience)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _start_alone() -> None:
    """Set the names that a launcher would set, for a run of one process.

    Without them DeepSpeed would look for MPI.
    """
    os.environ[STARTED_ALONE] = "1"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # 0: the system chooses
        return probe.getsockname()[1]


def import_deepspeed() -> Any:
    """Import DeepSpeed, set up for this machine. UserError where it is not installed."""
    if not torch.cuda.is_available():  # before the import, which decides on the accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): pip install "
                        "'tokenloom[train]'") from None

    if not torch.cuda.is_available():
        # On CPU this op would be compiled when the first engine starts (minutes; a killed build
        # leaves a lock that hangs every later run). Without it gloo gives bit-identical results.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # INFO is pages for each engine
    return deepspeed


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """The precision of a run; `auto` is bfloat16 on CUDA and float32 on the CPU."""
    asked = config.train.precision
    if asked == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if (asked == "float16" and device.type == "cpu"
            and not torch.ops.mkldnn._is_mkldnn_fp16_supported()):
        raise UserError("train.precision float16: this CPU has no instructions for it; use float32")
    return asked
