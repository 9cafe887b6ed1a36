"""What benchmarks share: alternating timings, peak memory, facts about the machine, the JSON document.

Timing. Candidates take turns (A, B, then B, A, ...) so that a machine that slows down slows all of them; medians and
quartiles over the rounds; a ratio is the median of the rounds' ratios, not the ratio of two medians.

Peak memory. On CUDA: `max_memory_allocated` over what was allocated before. On the CPU: each case runs once in a fresh child
process, which builds the case, gives freed memory back, notes its resident memory, sets the kernel's high-water mark back to
it (Linux, writing 5 to /proc/self/clear_refs) and runs the case; the figure is the high-water mark's rise. It holds what the
first call of a process costs once (thread pools, kernels' scratch), a few MiB. In the child glibc gives every freed block of
1 MiB back at once (MALLOC_MMAP_THRESHOLD_), so that the figure is what tensors need; by default glibc keeps some of it, more
or less by chance. `ru_maxrss` alone would not do: a Linux child starts with its parent's. It is the fallback elsewhere, and
understates where building the case needed more than running it.
"""

from __future__ import annotations

import argparse
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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenloom_common.errors import OneLineParser, RunFailedError, UserError
from tokenloom_common.files import write_json_atomic

SEED = 0
MIB = 1024 * 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Case = Callable[[], object]


class Timing(NamedTuple):
    """Seconds of each round."""

    seconds: list[float]

    def summary(self) -> dict[str, float]:
        """Median and quartiles in seconds."""
        low, middle, high = quartiles(self.seconds)
        return {"median_s": round(middle, 6), "quartile1_s": round(low, 6), "quartile3_s": round(high, 6)}

    def plus(self, other: Timing) -> Timing:
        """One after the other, round by round."""
        return Timing([a + b for a, b in zip(self.seconds, other.seconds, strict=True)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), interpolated; all the same for a single value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speed_ratio(ours: Timing, theirs: Timing) -> float:
    """Median over the rounds of their time / our time: above 1 = ours is faster."""
    return round(statistics.median(b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)), 3)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_alternating(candidates: Mapping[str, Case], repeats: int, device: str = "cpu", warmup: int = 1) -> dict[str, Timing]:
    """Run each candidate `warmup` times, then all of them in turn `repeats` times, every second round backwards."""
    names = list(candidates)
    for name in names * warmup:
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        for name in names if number % 2 == 0 else reversed(names):
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def peak_memory(build: str, arguments: dict[str, Any], device: str, threads: int) -> float:
    """MiB that one run of a case needs beyond what is there when it is built.

    build: "module:function", which takes `arguments` (JSON values) and gives the case. RunFailedError if the child fails.
    """
    if device == "cuda":
        return round(_cuda_peak(_case(build, arguments)) / MIB, 2)
    request = json.dumps({"build": build, "arguments": arguments, "threads": threads})
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "benchmarks.harness", request], check=False, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "",
                               "MALLOC_MMAP_THRESHOLD_": str(MIB)})
    if done.returncode:
        reason = f"killed by signal {-done.returncode}; too little memory?" if done.returncode < 0 else \
            (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailedError(f"memory of {build} {json.dumps(arguments)}: {reason}")
    return round(json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / MIB, 2)


def _case(build: str, arguments: dict[str, Any]) -> Case:
    module, function = build.split(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def _cuda_peak(case: Case) -> int:
    """Also of a case that starts counting anew in between, as each line of a training's log does."""
    torch.cuda.synchronize()
    before, peaks, start_anew = torch.cuda.memory_allocated(), [], torch.cuda.reset_peak_memory_stats
    start_anew()

    def noted(device: Any = None) -> None:
        peaks.append(torch.cuda.max_memory_allocated(device))
        start_anew(device)

    torch.cuda.reset_peak_memory_stats = noted
    try:
        case()
    finally:
        torch.cuda.reset_peak_memory_stats = start_anew
    torch.cuda.synchronize()
    return max([*peaks, torch.cuda.max_memory_allocated()]) - before


def _cpu_peak(case: Case) -> int:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc; what building freed would be reused unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a container without it: the high-water mark since the process began
        import resource  # not on Windows

        scale = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        case()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale
    before = _status("VmRSS")
    case()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RunFailedError(f"/proc/self/status has no {name}")


def environment(device: str, dtype: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(), "device_type": device, "dtype": dtype,
        "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.system(), "seed": SEED,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    if device == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                  "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    if hasattr(os, "getloadavg"):
        facts["load_average_1min_at_start"] = round(os.getloadavg()[0], 2)  # others on the machine make figures noisy
    return facts


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def whole_numbers(text: str, option: str) -> list[int]:
    """`1,8` -> [1, 8]. UserError unless all are whole numbers of at least 1."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} '{text}': expected whole numbers of at least 1, separated by commas, for example 1,8")
    return list(dict.fromkeys(int(part) for part in parts))


def start(device: str, threads: int | None) -> None:
    """Set threads and seed, once, for the process. UserError for a count below 1 or a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; leave --device out, or say --device cpu")
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads {threads} must be at least 1")
        torch.set_num_threads(threads)
    torch.manual_seed(SEED)


def command_parser(name: str, doc: str | None) -> OneLineParser:
    """The parser of `python -m benchmarks NAME`, with the module's docstring: its first paragraph, then the examples."""
    first, *rest = (doc or "").split("\n\n")
    return OneLineParser(prog=f"python -m benchmarks {name}", description=first, epilog="\n\n".join(rest[:2]),
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common_options(parser: OneLineParser, repeats: str) -> None:
    """What every benchmark takes. repeats: what the default number of rounds is, for people."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, help=f"rounds of each timing ({repeats})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--out", "--json", dest="out", help="also write the JSON document to this file")


def fill_in(args: argparse.Namespace, defaults: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Give options that were left out their defaults. UserError for a number below its least one."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, lowest in least.items():
        if getattr(args, name) < lowest:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {lowest}")


def check_output(name: str | None) -> Path | None:
    """The path of --out. UserError, before anything is measured, if no file can be written there."""
    if name is None:
        return None
    path = Path(name)
    if not name or path.is_dir():
        raise UserError(f"--out {name or '(empty)'}: is not a file's name; give one such as results.json")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {name[:200]}: cannot be written ({(error.strerror or str(error)).lower()})") from None
    return path


def finish(document: dict[str, Any], out: Path | None) -> None:
    """Write the document to --out and, on one line, as the last line of stdout."""
    if out is not None:
        write_json_atomic(out, document)
    print(json.dumps(document), flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table for people; None is a dash."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else \
        f"{value:,.0f}" if isinstance(value, float) else str(value)


def _child(request: str) -> None:
    values = json.loads(request)
    torch.set_num_threads(values["threads"])
    torch.manual_seed(SEED)
    print(json.dumps({"peak_bytes": _cpu_peak(_case(values["build"], values["arguments"]))}))


if __name__ == "__main__":
    _child(sys.argv[1])


def require_same_work(document: dict[str, Any], peer: str) -> None:
    """RunFailedError with the first check of the document that failed, if one did."""
    if not document["ok"]:
        wrong = next(row for row in document["verification"] if not row["ok"])
        raise RunFailedError(f"ours and {peer} do not do the same work, so nothing was timed: "
                             f"{', '.join(f'{key} {value}' for key, value in wrong.items() if key != 'ok')}")
