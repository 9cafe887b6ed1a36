"""Run a training script through the `deepspeed` launcher on all devices of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch

from tokenloom_common.errors import (
    DataError,
    MissingFileError,
    RunFailedError,
    StoppedBySignalError,
    UserError,
)

log = logging.getLogger(__name__)

SCRIPTS = Path(__file__).parents[1]
MOST_GPUS = 8
CPU_PROCESSES = 2
LOOK_SECONDS = 0.5  # between looks at a running script
LONGEST_SAVE = 300.0  # seconds that a stopped script may take to write its checkpoint
REASON_CODES = (UserError.exit_code, MissingFileError.exit_code, DataError.exit_code)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def process_count() -> int:
    """Number of processes: up to 8 GPUs, or 2 on a CPU; a power of two, which divides batches."""
    if torch.cuda.is_available():
        available = min(MOST_GPUS, torch.cuda.device_count())
    else:
        available = min(CPU_PROCESSES, len(os.sched_getaffinity(0)))
    return 1 << (available.bit_length() - 1)


def launcher_devices() -> list[str]:
    """Return the launcher's options for the devices that this process sees.

    UserError where CUDA_VISIBLE_DEVICES holds other names than numbers.
    """
    count = process_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or not torch.cuda.is_available():
        return ["--num_accelerators", str(count)]
    names = [name.strip() for name in visible.split(",")][:count]
    if not all(name.isdecimal() for name in names):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed takes numbers alone, "
                        "such as 0,1")
    # beside a plain count the launcher ignores the variable and takes the first GPUs
    return ["--include", "localhost:" + ",".join(names)]


def launch(script: str, *arguments: object, look: Callable[[], bool] | None = None) -> bool:
    """Run a script to its end; False if `look` had it stopped, after a checkpoint.

    look: called twice a second; True asks the script to save a checkpoint and end.
    RunFailedError where the script fails; StoppedBySignalError, after its checkpoint, on Ctrl-C or
    SIGTERM to this process.
    """
    # of this environment, which need not be on PATH
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher) if launcher.is_file() else "deepspeed", "--log_level", "warning",
               *launcher_devices(), "--master_port", str(_free_port()),
               str(SCRIPTS / script), *(str(argument) for argument in arguments)]
    log.info("$ %s", " ".join(command))
    with _signals() as received, _started(command) as job:
        stopped_by_look = False
        while job.process.poll() is None:
            time.sleep(LOOK_SECONDS)
            job.remember()
            if received:
                job.stop()
            elif look is not None and look():
                stopped_by_look = True
                job.stop()
        if received:
            # the terminal sends Ctrl-C to the launcher too, which then ends before the script
            job.stop()
            raise StoppedBySignalError(received[0])

    code = job.process.returncode
    if stopped_by_look:
        return False
    if code:
        error = RunFailedError(f"{script} ended with exit code {code}; its reason is printed above")
        if code in REASON_CODES:
            error.exit_code = code
        raise error
    return True


class _Job:
    """A launcher and all processes below it."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.family: dict[int, psutil.Process] = {}

    def remember(self) -> None:
        """Note the processes below: once the launcher has ended, nothing leads to them."""
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.family |= {child.pid: child for child in children}

    def stop(self) -> None:
        """Ask everything below the launcher to save a checkpoint and end; wait until it has."""
        self.remember()
        for child in self.family.values():
            with contextlib.suppress(psutil.Error):
                child.terminate()
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=LONGEST_SAVE)
        for child in alive:
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(OSError):
            self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[_Job]:
    job = _Job(subprocess.Popen(command, preexec_fn=_end_with_parent))
    try:
        yield job
    except StoppedBySignalError:
        raise
    except BaseException:
        job.stop()
        raise


def _end_with_parent() -> None:
    """Let the kernel end the launcher when this process is killed.

    Its scripts notice that the launcher is gone, save a checkpoint and end.
    """
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, int(signal.SIGTERM))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of ending; yields the list that they are added to."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # 0: the system chooses, so that two runs do not meet
        return probe.getsockname()[1]
