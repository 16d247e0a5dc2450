"""Memory that a process may still take (the machine's, its control group's, or a GPU's), and the most that it took."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from veneer.model.heap import kept_bytes

PROC, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    """Bytes of memory that may still be taken on a device; what the system holds for files counts as free.

    On a GPU that is what the driver has left and what torch's allocator holds without use. On a CPU no control group
    may come to its limit (containers have one), and what the process keeps of freed memory while it trains is free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([int(psutil.virtual_memory().available), *group_rooms(PROC, CGROUPS)]) + kept_bytes()


def high_water() -> int | None:
    """Return the most bytes that this process has held so far; None if the system does not say.

    Linux's `getrusage` would count what the process that began this one held.
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
    """Return True if an error of Python, torch or safetensors means that memory was asked for and not given."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "cannot allocate memory" in told or "can't allocate memory" in told


def address_limit() -> int | None:
    """Return the bytes of addresses that the process may have in all (``ulimit -v``); None if nothing limits them."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


class _Names(NamedTuple):
    """The names of control groups' files in one of their versions, and the line of its reclaimable pages."""

    limit: str
    used: str
    reclaimable: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Bytes under the limit of each control group that a process is in, from its own up.

    ``membership`` is a file as /proc/self/cgroup, ``root`` where the groups lie; nothing if there are none.
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
    """Of one group; a container does not see those above its own, and the topmost has no limit."""
    try:
        limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in names[:2])
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return
    if limit != "max":
        yield max(0, int(limit) - int(used) + int(pages.get(names.reclaimable, 0)))
