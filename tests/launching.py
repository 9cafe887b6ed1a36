"""Run the training scripts as users do: as processes, with or without the launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "training" / "recipes"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(threads: int = 1) -> dict[str, str]:
    """Offline, on the CPU, with `threads` threads per process."""
    # our `deepspeed`
    own_folder_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "", "PATH": own_folder_first}


def python(script: str, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run `python script arguments`."""
    return _run([sys.executable, script], arguments, timeout)


def deepspeed(processes: int, script: str, *arguments: object,
              timeout: float = 280) -> subprocess.CompletedProcess:
    """Run `deepspeed --num_accelerators processes script arguments`."""
    launcher = ["deepspeed", "--num_accelerators", str(processes),
                "--master_port", str(free_port())]
    return _run([*launcher, script], arguments, timeout)


def _run(command: list[str], arguments: tuple, timeout: float) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *map(str, arguments)], cwd=REPOSITORY, env=environment(),
                          text=True, timeout=timeout, capture_output=True, check=False)
