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
"""Of what a module computes in, by precision."""


PATIENCE = timedelta(hours=2)
"""That processes wait for one another: the first one reads the headers of all tar shards alone. (Steps have the watchdog.)"""


@contextmanager
def processes(threads: int = 0, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Join the launcher's processes, or be the only one when there is no launcher; leave them at the end.

    Sets the global state of this program: threads, TF32, the process group. patience: how long one waits for the others.
    """
    deepspeed = _import_deepspeed()
    alone = "RANK" not in os.environ
    if alone:
        os.environ[STARTED_ALONE] = "1"
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", str(_free_port()))):
            os.environ[name] = value
    use_cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // processes_here()))
    with meeting():
        deepspeed.init_distributed(dist_backend="nccl" if use_cuda else "gloo", verbose=False, timeout=patience)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"training needs DeepSpeed ({error}): pip install 'tokenloom[train]'") from None
    if not torch.cuda.is_available():
        # On CPU this op would be compiled when the first engine starts (minutes; a killed build leaves a lock that
        # hangs every later run). Without it gloo gives bit-identical results.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """`auto` is bfloat16 on CUDA and float32 on the CPU."""
    if config.train.precision == "float16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise UserError("train.precision float16: this CPU has no instructions for it; use float32")
    if config.train.precision != "auto":
        return config.train.precision
    return "bfloat16" if device.type == "cuda" else "float32"
