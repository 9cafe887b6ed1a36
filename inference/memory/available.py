"""Memory available to this process: control groups, address space, devices."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: str | torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated; None where that is unknown.

    CPU: the least of what the machine has left, the limits of the process's control groups (v1 or v2) and its own limit on
    addresses (ulimit -v). CUDA: what the driver has left and what torch holds without using it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [_numbers(root / "proc/meminfo").get("MemAvailable:", None), *_control_groups(root), _address_space(root)]
    known = [value for value in found if value is not None]
    return max(0, min(known)) if known else None


def _control_groups(root: Path) -> list[int]:
    """What each control group that the process is in, and those above it, leave; empty without limits."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, limit, usage, cache = ("", "memory.max", "memory.current", "inactive_file") if not controllers else (
            "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        mount = root / "sys/fs/cgroup" / top
        inside = mount / path.strip("/")
        for folder in (inside, *(above for above in inside.parents if above.is_relative_to(mount))):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:  # files that were read count as used, and give way
                left.append(most - used + _numbers(folder / "memory.stat", unit=1).get(cache, 0))
    return left


def _address_space(root: Path) -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _numbers(root / "proc/self/status").get("VmSize:", 0)
    return None if limit == resource.RLIM_INFINITY else limit - used


def _number(path: Path) -> int | None:
    """The number in a file of the kernel's; None for "max" or without the file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path, unit: int = 1024) -> dict[str, int]:
    """Lines `name number [kB]` of a file of the kernel's -> bytes by name; empty without the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {line[0]: int(line[1]) * unit for line in words if len(line) > 1 and line[1].isdecimal()}
