"""Memory available to this process: control groups, address space, devices."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: str | torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be allocated, None if that is unknown.

    CPU: the least of what the machine has left, the limits of the process's control groups (v1 or
    v2) and its own limit on addresses (ulimit -v). CUDA: what the driver has left, and what torch
    holds without using it. root: of the file system, for tests.
    """
    device = torch.device(device)
    # reserved - allocated: torch's allocator keeps freed blocks, which the driver counts as used
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    machine = kernel_numbers(root / "proc/meminfo").get("MemAvailable:")
    limits = [machine, *_control_groups(root), _address_space(root)]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def _control_groups(root: Path) -> list[int]:
    """Return the bytes left in each limited control group of the process, and in those above."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)  # "hierarchy:controllers:path", man 7 cgroups
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup"
        if controllers == "":  # v2
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cache = ("memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_inactive_file")
            mount = mount / "memory"
        group = mount / path.strip("/")
        above = [folder for folder in group.parents if folder.is_relative_to(mount)]
        for folder in (group, *above):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is None or used is None:
                continue
            # the cache of files counts as used, but the kernel frees it when memory runs short
            freeable = kernel_numbers(folder / "memory.stat", unit=1).get(cache, 0)
            left.append(most - used + freeable)
    return left


def _address_space(root: Path) -> int | None:
    """Return the bytes left under ulimit -v, None without such a limit."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = kernel_numbers(root / "proc/self/status").get("VmSize:", 0)
    return limit - used


def _number(path: Path) -> int | None:
    """Read the number in a file of the kernel's; None for "max" or without the file."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def kernel_numbers(path: Path, unit: int = 1024) -> dict[str, int]:
    """Read lines `name number [kB]` of a kernel file as bytes by name; empty without the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    numbers = {}
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[1].isdecimal():
            numbers[words[0]] = int(words[1]) * unit
    return numbers
