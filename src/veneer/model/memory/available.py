"""Memory available to a process (the machine's, its control group's, or a GPU's), and its peak use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from veneer.model.memory.heap import kept_bytes

PROC, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Return the bytes of memory available on a device. The system's cache of files counts as free.

    On a GPU that is the driver's free memory and the unused memory of torch's allocator. On a CPU it is limited by the
    control groups of the process (as in containers). Freed memory that the process keeps while it trains counts as
    free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([int(psutil.virtual_memory().available), *group_rooms(PROC, CGROUPS)]) + kept_bytes()


def high_water() -> int | None:
    """Return the largest number of bytes that this process has held so far, or None if the system does not report it.

    On Linux the number is not that of `getrusage`, which would include the memory of the parent process.
    """
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    import resource  # which Windows does not have

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) if sys.platform == "darwin" else int(most) * 1024


def no_memory(error: Exception) -> bool:
    """Return True if an error of Python, torch or safetensors means that an allocation failed."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "cannot allocate memory" in told or "can't allocate memory" in told


def address_limit() -> int | None:
    """Return the limit of the process's address space in bytes (``ulimit -v``), or None if there is none."""
    if sys.platform == "win32":
        return None
    import resource  # as above

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


class _Names(NamedTuple):
    """Names of control groups' files in one version of Linux's control groups, and the line that counts reclaimable
    pages.
    """

    limit: str
    used: str
    reclaimable: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Yield the free bytes under the limit of each control group of a process, from its own group upwards. Yield
    nothing if the system has no control groups.

    ``membership`` is a file like /proc/self/cgroup, ``root`` the folder of the groups.
    """
    if not membership.exists():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top, names = (root, _V2) if controllers == "" else (root / "memory", _V1)
            own = top / path.strip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    yield from _room(folder, names)


def _room(folder: Path, names: _Names) -> Iterator[int]:
    """Yield the memory left in a control group if it has a limit. Yield nothing otherwise.

    A container does not see the groups above its own, and the root group has no limit.
    """
    try:
        limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in names[:2])
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return
    if limit != "max":
        yield max(0, int(limit) - int(used) + int(pages.get(names.reclaimable, 0)))
