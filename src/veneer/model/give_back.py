"""Return of memory that a process holds and does not need to the system."""

from __future__ import annotations

import ctypes
import mmap
import os
from itertools import chain
from pathlib import Path

import psutil
from torch import nn

from veneer.model.heap import trim

SMAPS = Path("/proc/self/smaps")


def give_back(model: nn.Module) -> None:
    """Give back the process's freed memory, and the pages of the files that the model's tensors are mapped from.

    One tensor that is kept holds the map of its whole file. The file's pages stay resident, though most were read for
    the last time. A page that is read again comes back from the file. A map with a written page is left unchanged,
    since its writes would be lost. This works on Linux; on other systems nothing is given back.
    """
    if not os.access(SMAPS, os.R_OK):
        return
    libc = ctypes.CDLL(None)
    tensors = chain(model.parameters(), model.buffers())
    addresses = {tensor.data_ptr() for tensor in tensors if tensor.is_cpu}
    for place in psutil.Process().memory_maps(grouped=False):
        first, end = (int(address, 16) for address in place.addr.split("-"))
        # A map of huge pages has a path, counts neither as anonymous nor as resident, and would come back as zeros.
        unwritten = place.path.startswith("/") and place.rss and not place.anonymous and not place.swap
        if unwritten and any(first <= address < end for address in addresses):
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
    trim()  # last, for the list of maps takes megabytes
