"""Return of unneeded memory to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from veneer.model.memory.heap import trim

MAPS, SMAPS = Path("/proc/self/maps"), Path("/proc/self/smaps")


def give_back(model: nn.Module) -> None:
    """Return to the system the process's freed memory, and the resident pages of mapped files that hold the model's
    tensors.

    One tensor is enough to keep its whole file mapped, and all pages read so far would stay resident, though most are
    not read again. They are dropped here; a page that is read again comes back from the file. A map with a written page
    is left unchanged, since its writes would be lost. This works on Linux; on other systems nothing is returned.
    """
    if not os.access(SMAPS, os.R_OK):
        return
    libc = ctypes.CDLL(None)
    named: Iterable[Any] = chain(model.parameters(), model.buffers())
    tensors = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in named)  # a part, if it is cut
    held = _file_maps({tensor.data_ptr() for tensor in tensors if tensor.is_cpu})
    listed = SMAPS.read_text(encoding="utf-8", errors="replace") if held else ""
    for name, (first, end) in held.items():
        pages = _pages_of(name, listed)
        # A map of huge pages has a path, counts neither as anonymous nor as resident, and would come back as zeros.
        if pages.get("Rss") and pages["Anonymous"] == pages["Swap"] == 0:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
    del listed  # megabytes
    trim()


def _pages_of(name: str, listed: str) -> dict[str, int]:
    """Return the sizes ``Rss``, ``Anonymous`` and ``Swap``, in kilobytes, of the memory map ``name`` in the text of
    ``SMAPS``. Return an empty dict if the map is gone.

    Only this map's lines are parsed, because parsing all lines takes ten times as long.
    """
    start = listed.find(f"{name} ")
    part = listed[start : listed.find("VmFlags:", start)] if start >= 0 else ""
    return {kind: int(n) for kind, n in re.findall(r"^(Rss|Anonymous|Swap): +(\d+) kB$", part, re.MULTILINE)}


def _file_maps(addresses: Collection[int]) -> dict[str, tuple[int, int]]:
    """Return the start and end of each mapped file that holds one of the addresses, by the map's name in ``SMAPS``.

    They are read from ``MAPS``, which does not count pages: reading ``SMAPS`` takes a tenth of a second, and most small
    models are mapped from no file.
    """
    found, order = dict[str, tuple[int, int]](), sorted(addresses)
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        if "/" in line:
            name = line.partition(" ")[0]
            first, end = (int(address, 16) for address in name.split("-"))
            if bisect_left(order, first) < bisect_left(order, end):
                found[name] = first, end
    return found
