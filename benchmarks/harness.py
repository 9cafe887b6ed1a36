"""Measuring for every benchmark: alternating timings, peak memory, facts about the machine.

Timing. Candidates take turns (A, B, then B, A, ...), so that a machine that slows down slows all of
them. Figures are medians and quartiles over the rounds; a ratio is the median of the rounds'
ratios, not the ratio of two medians.

Peak memory. On CUDA: `max_memory_allocated` less what was allocated before. On the CPU each case
runs once in a fresh child process, which builds the case, gives freed memory back, reads its
resident memory, resets the kernel's high-water mark to it (Linux, writing 5 to
/proc/self/clear_refs) and runs the case; the figure is the rise of the high-water mark. It includes
one-time costs of a process's first call (thread pools, kernels' scratch), a few MiB. In the child
glibc gives every freed block of 1 MiB back at once (MALLOC_MMAP_THRESHOLD_), so that the figure is
what tensors need; by default glibc keeps some of it, more or less by chance. `ru_maxrss` alone
would not do: a Linux child starts with its parent's. It is the fallback elsewhere, and understates
where building the case needed more than running it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from tokenloom_common.errors import RunFailedError, UserError

SEED = 0
MIB = 1024 * 1024
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Case = Callable[[], object]
"""Runs once what is measured; all it needs is built before."""


class Timing(NamedTuple):
    """Seconds of each round."""

    seconds: list[float]

    def summary(self) -> dict[str, float]:
        """Median and quartiles in seconds."""
        low, middle, high = quartiles(self.seconds)
        return {"median_s": round(middle, 6), "quartile1_s": round(low, 6),
                "quartile3_s": round(high, 6)}

    def plus(self, other: Timing) -> Timing:
        """Add two timings round by round, as if one ran after the other."""
        rounds = zip(self.seconds, other.seconds, strict=True)
        return Timing([first + second for first, second in rounds])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (first quartile, median, third quartile), interpolated; all equal for one value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    # inclusive: with few rounds, the exclusive method extrapolates beyond them
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speed_ratio(ours: Timing, peer: Timing) -> float:
    """Median over the rounds of the peer's time / our time: above 1 = ours is faster."""
    rounds = zip(ours.seconds, peer.seconds, strict=True)
    return round(statistics.median(peers / our for our, peers in rounds), 3)


def synchronize(device: str) -> None:
    """Wait for the device to finish its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(candidates: Iterable[T], rounds: int) -> Iterator[T]:
    """Yield all candidates in each round, every second round backwards."""
    forward = list(candidates)
    for number in range(rounds):
        yield from forward if number % 2 == 0 else reversed(forward)


def time_alternating(candidates: Mapping[str, Case], repeats: int, device: str = "cpu",
                     warmup: int = 1) -> dict[str, Timing]:
    """Run each candidate `warmup` times, then all of them in turns for `repeats` rounds."""
    for name in list(candidates) * warmup:  # caches fill, kernels compile, thread pools start
        candidates[name]()

    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name in in_turns(candidates, repeats):
        synchronize(device)  # or the clock would include what the last candidate queued
        start = time.perf_counter()
        candidates[name]()
        synchronize(device)
        seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


# ---- peak memory

def peak_memory(build: str, arguments: dict[str, Any], device: str, threads: int) -> float:
    """Measure the MiB that one run of a case needs beyond what is there once it is built.

    build: "module:function", which takes `arguments` (JSON values) and returns the case.
    RunFailedError if the child process fails.
    """
    if device == "cuda":
        return round(_cuda_peak(build_case(build, arguments)) / MIB, 2)

    # a new process and not a fork, which would have this one's memory and thread pools
    request = json.dumps({"build": build, "arguments": arguments, "threads": threads})
    root = str(Path(__file__).resolve().parents[1])
    # the child must find `benchmarks` whatever the working directory is
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "",
               "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    child = subprocess.run([sys.executable, "-m", "benchmarks.harness", request], check=False,
                           capture_output=True, text=True, env=environ)
    if child.returncode:
        reason = _why_it_failed(child)
        raise RunFailedError(f"memory of {build} {json.dumps(arguments)}: {reason}")
    answer = json.loads(child.stdout.splitlines()[-1])  # a case may print before
    return round(answer["peak_bytes"] / MIB, 2)


def _why_it_failed(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"killed by signal {-child.returncode}; too little memory?"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else "no message"


def build_case(build: str, arguments: dict[str, Any]) -> Case:
    """Call "module:function" with its arguments."""
    module, function = build.split(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def _cuda_peak(case: Case) -> int:
    """Peak bytes on CUDA, also of a case that resets the statistics, as a run's log lines do."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    peaks = []  # one per reset within the case
    reset = torch.cuda.reset_peak_memory_stats
    reset()

    def reset_and_keep(device: Any = None) -> None:
        peaks.append(torch.cuda.max_memory_allocated(device))
        reset(device)

    torch.cuda.reset_peak_memory_stats = reset_and_keep
    try:
        case()
    finally:
        torch.cuda.reset_peak_memory_stats = reset
    torch.cuda.synchronize()
    return max([*peaks, torch.cuda.max_memory_allocated()]) - before


def _cpu_peak(case: Case) -> int:
    gc.collect()  # or the case would free and reuse what building left behind
    # glibc only: memory that building freed would be reused, and its reuse not seen
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _cpu_peak_since_start(case)

    before = process_bytes("VmRSS")
    case()
    # the kernel's counters lag a little, so that a case without tensors may come out below 0
    return max(0, process_bytes("VmHWM") - before)


def _cpu_peak_since_start(case: Case) -> int:
    """Rise of the high-water mark since the process began: for systems without clear_refs."""
    import resource  # not on Windows

    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale


def process_bytes(name: str) -> int:
    """Read a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024  # "VmHWM:   123456 kB"
    raise RunFailedError(f"/proc/self/status has no {name}")


def _child(request: str) -> None:
    values = json.loads(request)
    torch.set_num_threads(values["threads"])
    torch.manual_seed(SEED)
    case = build_case(values["build"], values["arguments"])
    print(json.dumps({"peak_bytes": _cpu_peak(case)}))


# ---- the machine

def environment(device: str, dtype: str) -> dict[str, Any]:
    """Return the facts that figures depend on besides the code."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "device_type": device, "dtype": dtype, "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.system(), "seed": SEED,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  # torch allows TF32 in convolutions by default, in matrix products not
                  "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    if hasattr(os, "getloadavg"):  # not on Windows
        # other processes on the machine make figures noisy
        facts["load_average_1min_at_start"] = round(os.getloadavg()[0], 2)
    return facts


def _cpu_model() -> str:
    # Linux's processor() is empty or the architecture alone
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def start(device: str, threads: int | None) -> None:
    """Set threads and seed of the process. UserError for less than 1 thread or a missing GPU."""
    # before threads and seed are set: a mistake leaves the process as it was
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; leave --device out, or say "
                        "--device cpu")
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    torch.manual_seed(SEED)


if __name__ == "__main__":
    _child(sys.argv[1])
