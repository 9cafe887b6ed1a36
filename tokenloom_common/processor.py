"""The processor: what it is, and how many of its cores are free."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
LOAD = Path("/proc/loadavg")
IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags",
            "Features", "CPU implementer", "CPU part")
"""Lines of CPU_INFO that tell processors apart; the last three are ARM's."""
SAMPLES = 11  # of the load
SAMPLE_SECONDS = 0.002


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's name, usable cores and a hash of its features, as a part of a key."""
    facts = _cpu_info()
    name = facts.get("model name") or platform.processor() or platform.machine()
    features = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=4).hexdigest()
    return f"{name} ({features}), {usable_cores()} of {os.cpu_count()} cores"


def _cpu_info() -> dict[str, str]:
    """Return the IDENTITY of the first processor of CPU_INFO; empty where there is no such file."""
    facts: dict[str, str] = {}
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return facts
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() in IDENTITY:
            facts[name.strip()] = value.strip()
    return facts


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_cores(sleep: Callable[[float], None] = time.sleep) -> int:
    """Return the number of cores that no other process works on, at least 1; takes 20 ms.

    Threads that share a core with another process wait for each other at every barrier, at worst
    for a time slice each: on a busy machine fewer threads are much faster.
    """
    busy = others_running(sleep)
    return max(1, min((os.cpu_count() or 1) - busy, usable_cores()))


def others_running(sleep: Callable[[float], None] = time.sleep) -> int:
    """Return how many other threads of the machine run or wait for a core: the median of SAMPLES.

    Without Linux's figure: the load average of the last minute; 0 where there is none.
    """
    try:
        counts = []
        for _ in range(SAMPLES):
            # "0.20 0.18 0.12 1/80 11206": the fourth is running / existing threads
            running = LOAD.read_text(encoding="ascii").split()[3].partition("/")[0]
            counts.append(max(0, int(running) - 1))  # without this one
            sleep(SAMPLE_SECONDS)
        return round(statistics.median(counts))
    except (OSError, ValueError, IndexError):
        pass
    try:
        return round(os.getloadavg()[0])
    except (OSError, AttributeError):
        return 0
