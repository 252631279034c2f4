"""How much memory is free, for this process, on a device."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_free_of_the_machine(), _free_of_the_group(), _free_of_the_process()]
    return min((one for one in found if one is not None), default=None) if device.type == "cpu" else None


def _free_of_the_machine() -> int | None:
    return _in_file(Path("/proc/meminfo"), "MemAvailable:", 1024)


def _free_of_the_group() -> int | None:
    """What a container's limit leaves, what it can drop at once (files in memory) included."""
    folder = Path("/sys/fs/cgroup")
    try:
        # Only in a container: the root group of a machine has no such file.
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    cached = _in_file(folder / "memory.stat", "inactive_file", 1) or 0
    return None if limit == "max" else max(0, int(limit) - used + cached)


def _free_of_the_process() -> int | None:
    """What `ulimit -v` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _in_file(Path("/proc/self/status"), "VmSize:", 1024)
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def _in_file(path: Path, key: str, unit: int) -> int | None:
    """A number of a file of `key number` lines, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(key)), None)
